"""The machine that is measured: what it is, how much memory is free, its clocks."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

import fusedopt
from fusedopt.extension import ISA

CYCLES_PER_S = 3e9  # no GPU's clock is faster
LONGEST_WAIT_S = 0.2  # a stream's queue is full long before
COPIED_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}  # more than caches hold

Step = Callable[[], object]


def environment(device: torch.device, packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a result depends on."""
    versions = {name: version for name in packages if (version := _version(name))}
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {
            "fusedopt": fusedopt.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            **versions,
            **({"cuda": torch.version.cuda} if device.type == "cuda" else {}),
        },
        "device": device.type,
        "cpu": cpu_model(),
        "isa": ISA,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # what ran here in the last minute
        "cpus": os.cpu_count(),  # the machine's, as the load is; not only those we may use
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["driver"] = _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
        found["launch_us"] = _launch_us(device)
    return found


def _launch_us(device: torch.device) -> dict[str, float]:
    """What a kernel that does nothing takes, of the host and of the GPU: no step takes less."""

    def launch() -> None:
        torch.cuda._sleep(0)

    host = host_seconds(launch, lambda: None, clock(device), budget=0.1)
    return {"host": 1e6 * host, "device": 1e3 * device_ms(launch, host)}


def describe(environment: dict[str, Any]) -> str:
    """An environment in one line."""
    found = environment
    where = [found.get("gpu"), found["cpu"], found["isa"], f"{found['threads']} threads"]
    facts = [f"load average {found['load_average']:.2f}"]
    if "launch_us" in found:
        host, gpu = (found["launch_us"][key] for key in ("host", "device"))
        facts.append(f"a launch takes {host:.1f} us of the host and {gpu:.1f} of the GPU")
    return ", ".join([f"torch {found['versions']['torch']}", *filter(None, where), *facts])


def free_bytes(device: torch.device) -> int:
    """How much more memory can be had."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        (free,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, ValueError):  # not Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:  # a container may have less
        group = Path("/sys/fs/cgroup")
        most, used = (int((group / f"memory.{x}").read_text()) for x in ("max", "current"))
    except (OSError, ValueError):
        return free
    return min(free, most - used)


def clock(device: torch.device) -> Callable[[], float]:
    """Reads seconds once the device has done what it was told to."""
    if device.type == "cpu":
        return time.perf_counter

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def copied_per_second(device: torch.device) -> float:
    """Bytes that a copy within the device's memory reads and writes per second."""
    size = COPIED_BYTES[device.type]
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    now = clock(device)
    copies = 1 if device.type == "cpu" else 8  # beside which the wait for a GPU is short
    times = []
    for _ in range(7):
        start = now()
        for _ in range(copies):
            target.copy_(source)
        times.append((now() - start) / copies)
    return 2 * size / statistics.median(times)


def host_seconds(
    step: Step, move: Callable[[], None], now: Callable[[], float], budget: float
) -> float:
    """Seconds until a step's call returns, when the device is idle and the gradients have moved.

    The median of 20, or of fewer within the budget in seconds, but three at least.
    """
    times: list[float] = []
    while len(times) < 3 or (len(times) < 20 and sum(times) < budget):
        move()
        start = now()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def device_ms(step: Step, host: float) -> float:
    """Milliseconds of the current GPU for a step whose call takes the host so many seconds."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: list[float] = []
    for _ in range(5):
        # The device is made to wait until all is queued: what it does then, it does without a gap.
        torch.cuda._sleep(int(min(2 * host, LONGEST_WAIT_S) * CYCLES_PER_S))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def extra_bytes(step: Step) -> int:
    """Bytes of the current GPU's memory that a step takes for itself."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def launches(step: Step) -> int:
    """Kernels, copies and fills of the current GPU in a step.

    To be asked when all has been timed: what the profiler leaves behind makes launches slower.
    """
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    found = [
        event
        for event in profile.events() or ()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]
    return len(found)


def _commit() -> str | None:
    """The checkout's commit, marked when files differ from it; None outside a checkout."""
    if _output("git", "ls-files", Path(__file__).name) is None:  # in somebody else's repository
        return None
    return _output("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _output(*command: str) -> str | None:
    """What a command prints beside this file; None when that is nothing, or it fails."""
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
