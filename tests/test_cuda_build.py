"""The CUDA kernels compile, and keep what they work on in registers. (``make resources``.)"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from test_core import CSRC, load_setup

from fusedopt.extension import build_info

ARCHITECTURE = "sm_90"


def test_the_build_has_them() -> None:
    """Where there is an nvcc; and the module loads without a driver."""
    if load_setup().find_nvcc() is None:
        pytest.skip("no nvcc")
    info = build_info()["CUDA"]
    assert re.match(r"compiled for [\d,]+; \d+ device\(s\)", info), info


def test_kernels_do_not_spill(tmp_path: Path) -> None:
    setup = load_setup()
    nvcc = setup.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    command = [
        *(nvcc, *setup.CUDA_KERNEL, f"-arch={ARCHITECTURE}", "-Xptxas=-v", "-c"),
        '-DFUSEDOPT_CUDA_ARCHS=""',
        *(str(CSRC / "cuda.cu"), "-o", str(tmp_path / "cuda.o")),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "warning" not in result.stdout + result.stderr
    names = subprocess.run(["c++filt"], input=result.stderr, capture_output=True, text=True).stdout
    kernels = re.findall(
        r"Compiling entry function '(?:void )?(?:fusedopt::cuda::)?(.*?)\(fusedopt.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers",
        names,
        re.DOTALL,
    )
    # Nine rules, norm and accumulation, each in two types; and uploads in two sizes.
    assert len(kernels) == 24
    for name, stack, spills, registers in sorted(kernels):
        print(f"{registers:>4} registers  {name.replace('fusedopt::cuda::', '')}")
        assert (name, stack, spills) == (name, "0", "0")
