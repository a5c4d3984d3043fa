"""The wheel: built in isolation, without torch, and running on its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built by pip from a copy of the sources, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("csrc", "fusedopt"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "*.pyc"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "-q", "wheel", "--no-deps", "-w", str(folder), str(source)]
    # Without CUDA's kernels, which take minutes and are in the build that all other tests use.
    environment = {**os.environ, "FUSEDOPT_CUDA": "0"}
    result = subprocess.run(pip, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    (wheel,) = folder.glob("fusedopt-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    return folder / "unpacked"


def test_wheel_runs(unpacked: Path, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(unpacked)!r})\n"
        "import torch, fusedopt, fusedopt.bench.command\n"
        f"assert fusedopt.__file__.startswith({str(unpacked)!r})\n"
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)\n"
        "fusedopt.SGD([p], lr=0.5).step()\n"
        "assert p.tolist() == [0.5] * 3"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_wheel_needs_no_torch_libraries(unpacked: Path) -> None:
    (library,) = (unpacked / "fusedopt").glob("_C.*.so")
    needed = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout
    libraries = [line.split("[")[1].rstrip("]") for line in needed.splitlines() if "NEEDED" in line]
    assert libraries
    assert not [name for name in libraries if "torch" in name or "c10" in name or "cuda" in name]
    assert (unpacked / "fusedopt" / "py.typed").exists()
    assert (unpacked / "fusedopt" / "_C.pyi").exists()
