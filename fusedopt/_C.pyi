"""The extension, built from csrc/. Only fusedopt.optimizer imports it."""

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

class Stepper:
    """Takes the steps of one optimizer: begin(), gather(), run(), end()."""

    def __init__(self, family: str, unshared: Callable[[torch.Tensor], bool]) -> None:
        """unshared(tensor): whether nothing else leads to the tensor's memory."""

    def begin(self) -> None:
        """RuntimeError when a step of this optimizer runs already."""

    def end(self) -> None: ...
    def forget(self) -> None:
        """Lets go of the state's tensors; they are looked for again at the next step."""

    def gather(
        self, attributes: dict[str, Any], created: bool, grad_scale: float
    ) -> tuple[list[tuple[int, int, list[str]]], list[tuple[int, int, str]]] | None:
        """Reads and checks everything, and writes nothing.

        attributes: the optimizer's __dict__; what gather() leaves there as "_state_seen" must be
        removed, and forget() called, when someone asks for the state.

        Returns None when run() may follow; else (missing, fallback). missing: (group, parameter,
        names) of state that must be created, after which gather(created=True) must be called.
        fallback: (group, parameter, reason) of what run() will leave to torch.
        """

    def updated(self) -> list[torch.Tensor]:
        """What run() will write to and others may know of: for autograd's version counters."""

    def run(self, threads: int, stream: bool = False) -> None:
        """Carries out what gather() found, without the GIL."""
