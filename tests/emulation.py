"""fusedopt on a device that does not exist: its CUDA path without a GPU.

The extension is built once more, with kernels that run lane by lane on the CPU (emulated_cuda.cpp)
on the tensors of two made-up devices whose memory the host cannot touch (fake_device.cpp). All
else, from the optimizers down to the tables in device memory, is what runs on CUDA.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fake_device
import ninja
import pybind11

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "emulated"

_library: ctypes.CDLL | None = None


def _build() -> Path:
    """Compile what changed."""
    spec = importlib.util.spec_from_file_location("fusedopt_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    compiler = setup.find_compiler()
    common = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fopenmp", f"-I{ROOT}/csrc"]
    python = ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]
    # The CPU's kernels, too: both round alike where there are fused multiply-adds.
    x86 = setup.builds_x86_kernels(compiler)
    kernels = {"cpu_base.cpp": [], **(setup.X86_KERNELS if x86 else {})}
    common += ["-DFUSEDOPT_X86"] if x86 else []
    emulated = [*setup.KERNEL, "-O2", "-DFUSEDOPT_ISA=emulated"]
    flags = {
        **{ROOT / "csrc" / f"{name}.cpp": python for name in setup.PYTHON_SOURCES},
        **{ROOT / "csrc" / f"{name}.cpp": [] for name in setup.SOURCES},
        **{ROOT / "csrc" / name: setup.KERNEL + isa for name, isa in kernels.items()},
        ROOT / "tests" / "emulated_cuda.cpp": emulated + kernels.get("cpu_avx2.cpp", []),
    }
    target = FOLDER / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    lines = [
        "rule compile",
        f"  command = {setup.ninja_quote([*compiler, *common])} $flags -MMD -MF $out.d"
        " -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {setup.ninja_quote(compiler)} -shared -fopenmp $in -o $out",
    ]
    for source, extra in flags.items():
        lines.append(f"build {source.stem}.o: compile {source}")
        lines.append(f"  flags = {setup.ninja_quote(extra)}")
    lines.append(f"build {target}: link {' '.join(f'{source.stem}.o' for source in flags)}")
    with fake_device.alone_in(FOLDER):
        (FOLDER / "build.ninja").write_text("\n".join(lines) + "\n")
        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(FOLDER)]
        run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    return target


def _guarded(stepper: type) -> type:
    """The same class; while one of its methods runs, the host cannot touch device memory."""

    def guard(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def guarded(*args: Any) -> Any:
            shut()
            try:
                return method(*args)
            finally:
                open_again()

        return guarded

    device = fake_device.load()
    shut, open_again = (
        ctypes.CFUNCTYPE(None)(a()) for a in (device.shut_address, device.open_address)
    )
    methods = {name: guard(m) for name, m in vars(stepper).items() if not name.startswith("_")}
    return type("Stepper", (stepper,), methods)


def install() -> None:
    """Make this the extension that fusedopt loads; before fusedopt is imported."""
    global _library
    assert "fusedopt" not in sys.modules
    device = fake_device.load()
    path = _build()
    spec = importlib.util.spec_from_file_location("fusedopt._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["fusedopt._C"] = module
    _library = ctypes.CDLL(str(path))
    _library.emulated_set_driver(ctypes.c_void_p(device.driver_address()))
    for name in ("launches", "uploads"):
        getattr(_library, f"emulated_{name}").restype = ctypes.c_int64
    module.Stepper = _guarded(module.Stepper)


def synchronizations() -> int:
    """How often the host has waited for a device."""
    return fake_device.load().synchronizations()


def launches() -> int:
    """Kernels launched, but for those that copy."""
    return _library.emulated_launches()


def uploads() -> int:
    """Copies of tables, or parts of them, to a device."""
    return _library.emulated_uploads()


class Graph:
    """As torch.cuda.CUDAGraph; but what is recorded is also done, except for our own kernels."""

    def __init__(self) -> None:
        self._graph = fake_device.load().Graph()

    @contextmanager
    def capture(self, share: Graph | None = None) -> Iterator[None]:
        """Record what the block launches, with a memory pool of its own, or another graph's."""
        pool = None if share is None else share._graph
        self._graph.begin(pool)
        try:
            yield
        finally:
            self._graph.end()

    def replay(self) -> None:
        """Do what has been recorded."""
        self._graph.replay()

    def nodes(self) -> int:
        """Kernels and copies that a replay takes."""
        return self._graph.nodes()
