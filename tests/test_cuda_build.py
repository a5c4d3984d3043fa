"""The CUDA kernels compile, and keep what they work on in registers. (``make resources``.)"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from test_core import CSRC, load_setup

ARCHITECTURE = "sm_90"


def test_kernels_do_not_spill(tmp_path: Path) -> None:
    setup = load_setup()
    nvcc = setup.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    command = [
        *(nvcc, *setup.CUDA_KERNEL, f"-arch={ARCHITECTURE}", "-Xptxas=-v", "-c"),
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
    assert len(kernels) == 22  # nine rules in two types; norm and accumulation in two types
    for name, stack, spills, registers in sorted(kernels):
        print(f"{registers:>4} registers  {name.replace('fusedopt::cuda::', '')}")
        assert (name, stack, spills) == (name, "0", "0")
