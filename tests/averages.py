"""What the tests of averages share: a model with all kinds of tensors, and how it changes."""

from __future__ import annotations

import contextlib
import dis
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import fusedopt
from fusedopt.swapping import Block

Subject = TypeVar("Subject")

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


# Where nobody's Ctrl-C arrives: Python asks for signals at calls, jumps, and the beginning of a
# function. Before its first bytecode, __exit__ cannot do anything about it.
_BLOCK = (Block.__enter__.__code__, Block.__exit__.__code__)
_SILENT = ("RESUME", "NOP", "LOAD_CONST", "POP_TOP", "POP_BLOCK", "RETURN_VALUE", "RETURN_CONST")


def interrupted_everywhere(
    make: Callable[[], Subject], act: Callable[[Subject], Any]
) -> Iterator[Subject]:
    """``act(make())`` for each bytecode of ours in it, with an interrupt there. Yields the subject.

    Of those that are run several times, in loops, it is the second time. In the first round, there
    is no interrupt.
    """
    ours, outer = fusedopt.__path__[0], sys.gettrace()
    visits: Counter[tuple[Any, int]] = Counter()
    chosen: dict[tuple[Any, int], int] = {}  # the number of the one to interrupt at

    def run(at: int) -> Subject:
        subject, passed = make(), 0

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal passed
            code = frame.f_code
            if not code.co_filename.startswith(ours):
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                if code in _BLOCK and dis.opname[code.co_code[frame.f_lasti]] in _SILENT:
                    return trace
                passed += 1
                if at == 0:
                    visits[code, frame.f_lasti] += 1
                    if visits[code, frame.f_lasti] <= 2:
                        chosen[code, frame.f_lasti] = passed
                elif passed == at:
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            with contextlib.suppress(KeyboardInterrupt) if at else contextlib.nullcontext():
                act(subject)
                assert not at  # it has been interrupted
        finally:
            sys.settrace(outer)
        return subject

    yield run(0)
    assert len(chosen) > 50
    for at in chosen.values():
        yield run(at)
