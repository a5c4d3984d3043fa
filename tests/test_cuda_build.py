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
    if load_setup().choose_cuda() is None:
        pytest.skip("no CUDA in this build")
    info = build_info()["CUDA"]
    assert re.match(r"compiled for [\daf,]+; \d+ device\(s\)", info), info


def test_architectures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By default those that the compiler knows; what one asks for is not questioned."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf 'compute_75\\ncompute_80\\ncompute_90\\ncompute_90a\\n'\n")
    nvcc.chmod(0o755)
    setup = load_setup()
    monkeypatch.delenv("FUSEDOPT_CUDA_ARCHS", raising=False)
    assert setup.cuda_archs(str(nvcc)) == "75,80,90"
    monkeypatch.setenv("FUSEDOPT_CUDA_ARCHS", "100a,120")
    assert setup.cuda_archs(str(nvcc)) == "100a,120"
    monkeypatch.setenv("FUSEDOPT_CUDA_ARCHS", "sm_90")
    with pytest.raises(SystemExit, match="FUSEDOPT_CUDA_ARCHS=sm_90"):
        setup.cuda_archs(str(nvcc))


def test_kernels_do_not_spill(tmp_path: Path) -> None:
    setup = load_setup()
    nvcc = setup.choose_cuda()
    if nvcc is None:
        pytest.skip("no CUDA in this build")
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
