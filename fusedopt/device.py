"""What a step keeps on CUDA devices: memory for the extension, and the reports left there.

A report is a tensor of 8-byte words, of which the device writes and nobody waits for: the norm of
the gradients, where the first is that is not finite, how many steps were skipped
(``csrc/device.h``). With parameters on several devices each measures its own gradients, and
:func:`combine` makes one norm of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fusedopt.extension import DEVICE, kernels

_WORD = kernels.REPORT_WORDS


def has_kernels(tensor: Tensor) -> bool:
    """Whether a tensor is where the extension's kernels are."""
    return tensor.device.type in ("cpu", DEVICE)


def on_device(value: Any) -> TypeGuard[Tensor]:
    """Whether something is a tensor on a device of the kernels, so that reading it would wait."""
    return isinstance(value, Tensor) and value.device.type == DEVICE


@torch.inference_mode(False)  # where it is first needed does not matter to the steps after
def allocate(size: int, device: int) -> Tensor:
    """At least so many bytes, zeros, on a device (-1: the CPU)."""
    place = torch.device("cpu") if device < 0 else torch.device(DEVICE, device)
    return torch.zeros(-(-size // 8), dtype=torch.int64, device=place)


@torch.inference_mode(False)
def allocate_for(size: int, device: int, stream: int) -> Tensor:
    """At least so many bytes, whatever is in them, on a device, for use on one of its streams.

    ``stream`` is the handle (a ``cudaStream_t``) of one that torch need not know.
    """
    module = torch.get_device_module(DEVICE)
    with module.stream(module.ExternalStream(stream, device)):
        return torch.empty(-(-size // 8), dtype=torch.int64, device=torch.device(DEVICE, device))


def record(tensor: Tensor, device: int) -> None:
    """Keep torch from reusing a tensor's memory before the current stream is done with it."""
    tensor.record_stream(torch.get_device_module(DEVICE).current_stream(device))


def spread(value: float | Tensor | None, devices: Iterable[int]) -> dict[int, Tensor]:
    """A number that is on a device, in float32 on each of some; nothing when it is not."""
    if not on_device(value):
        return {}
    return {i: value.to(torch.device(DEVICE, i), torch.float32, non_blocking=True) for i in devices}


def combine(reports: list[Tensor], norm_type: float) -> None:
    """Make the sums or maxima of several reports one, in all of them."""
    # When the CPU is among them, it comes last; then it has to wait for the others.
    meeting = reports[-1].device
    totals = torch.stack([r.view(torch.float64)[_WORD["total"]].to(meeting) for r in reports])
    total = totals.amax() if norm_type == math.inf else totals.sum()
    first = torch.stack([r[_WORD["nonfinite"]].to(meeting) for r in reports]).amax()
    for report in reports:
        report.view(torch.float64)[_WORD["total"]].copy_(total, non_blocking=True)
        report[_WORD["nonfinite"]].copy_(first, non_blocking=True)


def norm(report: Tensor) -> Tensor:
    """Where a report has the norm."""
    return report.view(torch.float64)[_WORD["norm"]]


def skipped(report: Tensor) -> Tensor:
    """Where a report counts the steps that its device was told to count."""
    return report[_WORD["skipped"]]


def first_nonfinite(report: Tensor) -> int:
    """The number of the first parameter whose gradient is not finite, or -1. Waits."""
    return int(report[_WORD["found"]]) - 1
