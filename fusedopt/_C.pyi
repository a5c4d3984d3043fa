"""The extension, built from csrc/. Only fusedopt.extension imports it."""

from collections.abc import Callable
from typing import Any

import torch

def bind_torch(tensor_type: type, parameter_type: type) -> None:
    """Connects the extension to torch's DLPack exchange API; once, before all else."""

def cpu_isa() -> str:
    """The instruction set in use. RuntimeError when FUSEDOPT_ISA names one not to be had."""

def cpu_isas() -> str:
    """Those to be had here, best first, separated by spaces."""

def cpu_has_threads() -> bool:
    """False in a build without OpenMP."""

def device_type() -> str:
    """The torch.device type that there are kernels for beside the CPU's; empty without CUDA."""

def cuda_architectures() -> str:
    """Those that the CUDA kernels were compiled for, as setup.py was told."""

def cuda_device_count() -> int:
    """Devices that the driver offers; 0 also without a driver."""

def is_capturing(device: int) -> bool:
    """Whether the device's current stream records a graph."""

def check_not_capturing(device: int) -> None:
    """RuntimeError when it does: for the first step, which must not be repeated by replays."""

REPORT_WORDS: dict[str, int]
"""Where a device's report has what: "total", "nonfinite", "found", "skipped", "norm"."""

def family_states(family: str) -> dict[str, bool]:
    """The states of a family's rules, and whether they are squares (quantize.h)."""

def family_vitals(family: str) -> list[str]:
    """What a parameter's state has all of, or none: "step", and states of every variant."""

def family_hypers(family: str) -> list[str]:
    """The keys of the numbers that a family's rules need in each parameter group."""

BLOCK: int
"""The elements that share a scale in 8-bit state."""

SOURCES: str
"""The digest of what the extension was built from (setup.py); empty when that did not build it."""

def end_window(attributes: dict[str, Any], skips: int) -> None:
    """Ends the window of micro-batches of the optimizer that has these attributes.

    skips: what to add to its number of skipped steps. Nothing can come between.
    """

class NormType:
    none: NormType
    two: NormType
    infinity: NormType
    __members__: dict[str, NormType]

class WeightPrecision:
    nearest: WeightPrecision
    master: WeightPrecision
    remainder: WeightPrecision
    stochastic: WeightPrecision
    kahan: WeightPrecision
    __members__: dict[str, WeightPrecision]

def join_weights(
    param: torch.Tensor,
    hidden: torch.Tensor,
    precision: WeightPrecision,
    whole: torch.Tensor,
    numel: int,
) -> None:
    """Writes the full weights to `whole` (float32). All contiguous, on the CPU."""

def split_weights(
    param: torch.Tensor,
    hidden: torch.Tensor,
    precision: WeightPrecision,
    whole: torch.Tensor,
    numel: int,
) -> None:
    """Writes full weights to parameter and hidden part."""

def decode_state(
    codes: torch.Tensor, scale: torch.Tensor, square: bool, values: torch.Tensor, numel: int
) -> None:
    """Writes the values (float32) of 8-bit codes."""

def encode_state(
    codes: torch.Tensor, scale: torch.Tensor, square: bool, values: torch.Tensor, numel: int
) -> None:
    """Writes the codes and scales of values (float32), rounded to the nearest."""

def average(
    means: list[torch.Tensor],
    values: list[torch.Tensor],
    weight: float,
    threads: int,
    written: Callable[[], None],
) -> bool:
    """Does mean += weight (value - mean), right for infinities, without the GIL.

    False, with nothing written, when a pair of tensors is not of the kernels. These take real
    tensors on the CPU: means in float32 or float64, values at most as wide, in the same order in
    memory, without gaps, and no mean in the memory of another one or of a value.

    written() is called when all are written, and called again when an interrupt has broken it off:
    when this returns or raises, both have been, or neither.
    """

class StepOptions:
    """The options of the step, for Stepper.configure(); negative numbers: none."""

    norm_type: NormType
    max_grad_norm: float
    max_grad_value: float
    weight_precision: WeightPrecision
    random_state: bool
    ema_decay: float
    ema_warmup: bool
    l1: float

class Stepper:
    """Takes the steps of one optimizer: in a `with` block gather(), measure(), run()."""

    def __init__(
        self,
        family: str,
        carried: list[str],
        check_carried: Callable[[dict[str, Any], dict[str, Any], int], None],
        unshared: Callable[[torch.Tensor], bool],
        allocate: Callable[[int, int], torch.Tensor],
        allocate_for: Callable[[int, int, int], torch.Tensor],
        record: Callable[[torch.Tensor, int], None],
    ) -> None:
        """carried: names of the options that a group may carry, when check_carried(attributes of
        the optimizer, group, its index) does not raise. It is called when such a group has changed.

        unshared(tensor): whether nothing else leads to the tensor's memory.

        allocate(bytes, device): device memory, zeros. allocate_for(bytes, device, stream): not
        cleared, for use on the stream with that handle. record(tensor, device): the device's
        current stream uses it from now on.
        """

    def configure(self, options: StepOptions) -> None: ...
    def __enter__(self) -> None:
        """RuntimeError when a step of this optimizer runs already."""

    def __exit__(self, *error: object) -> None:
        """Also after a step that has failed: it leaves no part of a norm on a device."""

    def wrote(self) -> bool:
        """Whether run() or accumulate() has begun to write in this `with` block.

        What Python has to remember of them they have written, too: "_micro_batches".
        """

    def forget(self) -> None:
        """Lets go of the state's tensors; they are looked for again at the next step."""

    def gather(
        self, attributes: dict[str, Any], created: bool, window: bool, accumulate: bool
    ) -> tuple[list[tuple[int, int, list[str]]], list[tuple[int, int, str]]] | None:
        """Reads and checks everything, and writes nothing.

        attributes: the optimizer's __dict__; what gather() leaves there as "_state_seen" must be
        removed, and forget() called, when someone asks for the state.
        window: look for accumulated gradients. accumulate: accumulate() follows instead of run().

        Returns None when that may follow; else (missing, fallback). missing: (group, parameter,
        names) of state that must be created, after which gather(created=True) must be called.
        fallback: (group, parameter, reason) of what run() will leave to torch.
        """

    def has_grads(self) -> bool:
        """Whether gather() found any gradient beside the accumulated ones."""

    def updated(self) -> list[torch.Tensor]:
        """What run() will write to and others may know of: for autograd's version counters."""

    def has_host(self) -> bool:
        """Whether gather() found parameters on the CPU."""

    def devices(self) -> list[int]:
        """The devices on which gather() found parameters."""

    def prepare(
        self,
        divisor: float,
        grad_scale: dict[int, torch.Tensor],
        found_inf: dict[int, torch.Tensor],
        skip_nonfinite: bool,
    ) -> None:
        """Prepares what follows: gradients are divided by divisor and the device's grad_scale.

        A device skips the step when its found_inf is not 0 or, after measure() and with
        skip_nonfinite, when a gradient anywhere is not finite.
        """

    def measure(self, threads: int) -> list[torch.Tensor]:
        """Measures the norm of the gradients, by which run() will clip.

        Returns reports that must be made one, and finish_measure() called; or nothing.
        """

    def finish_measure(self) -> None: ...
    def host_norm(self) -> tuple[float, int]:
        """The norm and the number of the first parameter with nan or inf, or -1; if has_host()."""

    def reports(self) -> dict[int, torch.Tensor]:
        """The devices' reports."""

    def name_of(self, number: int) -> str:
        """A parameter's index and group, for messages."""

    def run(self, threads: int, stream: bool) -> None:
        """Carries out what gather() found, without the GIL."""

    def accumulate(self, threads: int, count: int) -> None:
        """Moves the gradients into grad_sum, which is of count micro-batches then."""
