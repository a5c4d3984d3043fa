"""What scripts ask of ``torch.cuda``, answered for the emulated GPU (emulation.py)."""

from __future__ import annotations

import contextlib
from typing import Any

import emulation
import fake_device
import torch


class Stream:
    """The only one there is."""

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)


def install() -> None:
    """Make scripts that are told ``--device fake`` run; before fusedopt is imported."""
    emulation.install()
    # Autograd has a thread for each device, and each thread its own OpenMP team (conftest.py).
    torch.set_num_threads(1)
    answers: dict[str, Any] = {
        "Event": fake_device.Event,
        "CUDAGraph": emulation.Graph,
        "Stream": Stream,
        "current_stream": Stream,
        "graph": lambda graph: graph.capture(),
        "stream": lambda stream: contextlib.nullcontext(stream),
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "_sleep": lambda cycles: None,
    }
    for name, answer in answers.items():
        assert hasattr(torch.cuda, name)
        setattr(torch.cuda, name, answer)
    for name in ("start", "stop"):
        assert hasattr(torch.cuda.profiler, name)
        setattr(torch.cuda.profiler, name, lambda: None)
