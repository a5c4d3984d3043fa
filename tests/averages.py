"""What the tests of averages share: a model with all kinds of tensors, and how it changes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.complex64]


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """With buffers of both kinds, one that is not saved, and a shared parameter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[3].weight = model[2].weight
    model.register_buffer("mask", torch.tensor([True, False]))
    model.register_buffer("cache", torch.ones(3), persistent=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Complex modules")
        return model.to(dtype)


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """To the bit, with dtypes, whatever the order."""
    torch.testing.assert_close(dict(one), dict(other), rtol=0, atol=0)


@torch.no_grad()
def disturb(model: nn.Module, step: int) -> None:
    """Something like a step and a forward pass."""
    generator = torch.Generator("cpu").manual_seed(step + 1)
    for _, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() or tensor.is_complex():
            noise = torch.randn(
                tensor.shape, generator=generator, dtype=torch.float64, device="cpu"
            )
            tensor.add_(noise.to(tensor.device, tensor.dtype), alpha=0.1)
        elif tensor.dtype == torch.bool:
            tensor.logical_not_()
        else:
            tensor.add_(1)
