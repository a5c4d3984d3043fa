"""The fake accelerator of fake_device.cpp: builds it, and makes it torch's device "fake"."""

from __future__ import annotations

import fcntl
import functools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import ninja
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make a folder, and wait until no other test run builds in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "alone").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build() -> ModuleType:
    """The extension, compiled if it is not up to date."""
    folder = ROOT / "build" / "fake_device"
    path = os.environ["PATH"]
    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, path])  # where torch looks for it
    try:
        with alone_in(folder):
            (folder / "lock").unlink(missing_ok=True)  # torch's, left behind if it was killed
            return cpp_extension.load(
                name="fake_device",
                sources=[str(ROOT / "tests" / "fake_device.cpp")],
                extra_cflags=["-O1"],
                build_directory=str(folder),
            )
    finally:
        os.environ["PATH"] = path


class Event:
    """As torch.cuda.Event, of a device that is always done."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.time - self.time)


def external_stream(handle: int, device: int) -> torch.Stream:
    """The stream that the extension knows by this number."""
    return torch.Stream(
        stream_id=load().stream_id(handle),
        device_index=device,
        device_type=torch.accelerator.current_stream(device).device_type,
    )


@contextmanager
def use_stream(stream: torch.Stream) -> Iterator[None]:
    """Make it the current one of its device."""
    before = torch.accelerator.current_stream(stream.device_index)
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)


def device_module() -> ModuleType:
    """What torch asks of a device in Python: ``torch.fake``."""
    module = ModuleType("torch.fake")
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: 2
    module.current_device = torch.accelerator.current_device_index
    module.set_device = torch.accelerator.set_device_index
    module.device = lambda device: torch.accelerator.device_index(torch.device(device).index)
    module.get_amp_supported_dtype = lambda: []
    module.Event = Event
    module.current_stream = torch.accelerator.current_stream
    module.ExternalStream = external_stream
    module.stream = use_stream
    # Random numbers come from the CPU's generator.
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda device="fake": torch.get_rng_state()
    module.set_rng_state = lambda state, device="fake": torch.set_rng_state(state)
    return module


@functools.cache
def load() -> ModuleType:
    """Registers the devices "fake:0" and "fake:1", and returns the extension.

    Call it before the first ``backward()`` of the process: that is when autograd starts a thread
    for each device it knows.
    """
    extension = build()
    torch.utils.rename_privateuse1_backend("fake")
    torch._register_device_module("fake", device_module())
    return extension
