"""The C++ core on its own (core_test.cpp), the layers between its files, and its symbols."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
KNOWS_PYTHON = {
    *("average.h", "bind.cpp", "convert.h", "describe.cpp", "device.cpp", "device.h", "entry.h"),
    *("groups.h", "pytensor.cpp", "pytensor.h", "stepper.cpp", "stepper.h"),
}


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fusedopt_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_core(folder: Path, flags: list[str]) -> Path:
    """Compile core_test.cpp with the kernels, each with the flags that setup.py gives it."""
    setup = load_setup()
    compiler = setup.find_compiler()
    common = [*compiler, "-std=c++17", "-Wall", "-Wextra", "-fopenmp", f"-I{CSRC}", *flags]
    kernels = {CSRC / "cpu_base.cpp": setup.KERNEL}
    if setup.builds_x86_kernels(compiler):
        common.append("-DFUSEDOPT_X86")
        kernels |= {CSRC / k: setup.KERNEL + isa for k, isa in setup.X86_KERNELS.items()}
        # A GPU rounds as AVX2 does.
        kernels[ROOT / "tests" / "emulated_gpu.cpp"] = [
            *setup.KERNEL,
            *setup.X86_KERNELS["cpu_avx2.cpp"],
            "-DFUSEDOPT_ISA=emulated",
        ]
    engines = ("cpu.cpp", "cuda_table.cpp", "layout.cpp", "overlap.cpp")
    sources = {CSRC / name: [] for name in engines} | kernels
    sources[ROOT / "tests" / "core_test.cpp"] = []
    runs = [
        subprocess.Popen([*common, *extra, "-c", str(path), "-o", str(folder / f"{path.stem}.o")])
        for path, extra in sources.items()
    ]
    assert all([run.wait() == 0 for run in runs])
    program = folder / "core_test"
    objects = [str(folder / f"{path.stem}.o") for path in sources]
    subprocess.run([*common, *objects, "-o", str(program)], check=True)
    return program


def test_loops_over_elements_are_vectorized(tmp_path: Path) -> None:
    """All of update.h: one call that was not inlined, and a step takes five times as long."""
    setup = load_setup()
    compiler = setup.find_compiler()
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    if not setup.builds_x86_kernels(compiler) or "Free Software Foundation" not in version:
        pytest.skip("needs GCC on x86-64, which tells")
    for kernel, isa in setup.X86_KERNELS.items():
        report = tmp_path / f"{kernel}.txt"
        command = [*compiler, *setup.COMMON, *setup.KERNEL, *isa, "-DFUSEDOPT_X86", "-c"]
        subprocess.run(
            [*command, str(CSRC / kernel), "-o", os.devnull, f"-fopt-info-vec-missed={report}"],
            check=True,
        )
        missed = [
            int(line)
            for line in re.findall(
                r"update\.h:(\d+):\d+: missed: couldn't vectorize loop", report.read_text()
            )
        ]
        lines = (CSRC / "update.h").read_text().splitlines()
        # float16 rounded at random has too many cases for it.
        assert ["round_randomly" in lines[line - 1] for line in missed] in ([], [True]), missed


def run_core(program: Path, **environment: str) -> None:
    result = subprocess.run(
        [str(program)], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    passed = re.search(r"(\d+) passed, 0 failed", result.stdout)
    assert passed is not None
    assert int(passed[1]) > 100_000


def test_core(tmp_path: Path) -> None:
    program = compile_core(tmp_path, ["-O2"])
    run_core(program)
    # Kernels of one instruction set must not lend code to another: whatever the linker may merge
    # has to carry the set's name.
    for isa in ("base", "avx2", "avx512"):
        unit = tmp_path / f"cpu_{isa}.o"
        if unit.exists():
            symbols = subprocess.run(
                ["nm", "-C", "--defined-only", str(unit)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            shared = [s for s in symbols.splitlines() if re.match(r"\S+ [uVWT] ", s)]
            assert shared
            assert all(f"fusedopt::{isa}::" in symbol for symbol in shared)


@pytest.mark.sanitize
def test_core_under_sanitizers(tmp_path: Path) -> None:
    flags = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    run_core(compile_core(tmp_path, flags), ASAN_OPTIONS="detect_leaks=1")


def includes(path: Path) -> set[str]:
    return set(re.findall(r'#include [<"]([^>"]+)[>"]', path.read_text()))


def test_layers() -> None:
    """No torch anywhere; Python only where the binding is; kernels without the C++ library."""
    for path in CSRC.iterdir():
        names = includes(path)
        assert not [n for n in names if re.match(r"(torch|ATen|c10)/", n)]
        knows_python = bool({"Python.h", *KNOWS_PYTHON} & names) or any(
            n.startswith("pybind11/") for n in names
        )
        assert knows_python == (path.name in KNOWS_PYTHON), path.name
    kernel_files = [
        *("num.h", "random.h", "rules.h", "gradient.h", "norm.h", "quantize.h", "store.h"),
        *("update.h", "tile.h", "select.h", "cpu.inl", "quick.h"),
        *("cuda_plan.h", "cuda_formats.h", "cuda_warp.h", "cuda_buffer.h", "cuda_general.h"),
        *("cuda_registers.h", "cuda_direct.h"),
    ]
    own = {path.name for path in CSRC.iterdir()}
    for name in kernel_files:
        assert includes(CSRC / name) - own <= {"stdint.h", "math.h"}, name


def test_one_module_imports_the_extension() -> None:
    importers = [
        path.name
        for path in (ROOT / "fusedopt").glob("*.py")
        if re.search(r"\b(import|from)\b.*\b_C\b", path.read_text())
    ]
    assert importers == ["extension.py"]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


AVERAGE = """
import torch
from fusedopt.extension import kernels
torch.manual_seed(0)
for stored in (torch.float32, torch.bfloat16, torch.float16):
    for weight in (0.001, 0.75):
        means = [torch.randn(n) for n in (1, 7, 300, 5000)]
        values = [torch.randn(mean.shape).to(stored) for mean in means]
        values[2][::3] = means[2][1::3] = float("-inf")
        wanted = [mean.lerp(value.float(), weight) for mean, value in zip(means, values)]
        wanted[2][0::3] = wanted[2][1::3] = float("-inf")
        assert kernels.average(means, values, weight, 1, lambda: None)
        torch.testing.assert_close(means, wanted, rtol=1e-6, atol=1e-6)
print(kernels.cpu_isa())
"""


TRAIN = """
import torch, fusedopt, hashlib
torch.manual_seed(0)
for name in ("AdamW", "SGD", "RMSprop", "Adagrad"):
    p = torch.nn.Parameter(torch.randn(1003))
    optimizer = getattr(fusedopt, name)([p], lr=0.01, weight_decay=0.1)
    for _ in range(20):
        p.grad = torch.randn(1003)
        optimizer.step()
    print(" ".join(f"{x:.9f}" for x in p.tolist()[::5]))
print(fusedopt.extension.ISA)
"""


def available_sets() -> list[str]:
    listed = run_python("from fusedopt.extension import kernels; print(kernels.cpu_isas())")
    available = listed.stdout.split()
    assert "base" in available
    return available


def test_every_instruction_set_trains_alike() -> None:
    results = {
        isa: run_python(TRAIN, FUSEDOPT_ISA=isa).stdout.splitlines() for isa in available_sets()
    }
    for isa, lines in results.items():
        assert lines[-1] == isa
        for mine, reference in zip(lines[:-1], results["base"][:-1], strict=True):
            for a, b in zip(mine.split(), reference.split(), strict=True):
                assert abs(float(a) - float(b)) <= 2e-6


def test_every_instruction_set_averages() -> None:
    for isa in available_sets():
        result = run_python(AVERAGE, FUSEDOPT_ISA=isa)
        assert result.stdout.split() == [isa], result.stderr


def test_unknown_instruction_set_is_a_clear_error() -> None:
    result = run_python("import fusedopt", FUSEDOPT_ISA="mmx")
    assert result.returncode != 0
    assert 'FUSEDOPT_ISA is "mmx"' in result.stderr
    assert "base" in result.stderr


def test_info() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "fusedopt", "info"], capture_output=True, text=True, check=True
    )
    for word in ("fusedopt", "torch", "instruction set", "threads", "CUDA"):
        assert word in result.stdout


def test_too_old_torch_is_one_sentence() -> None:
    code = "import torch; del torch.Tensor.__dlpack_c_exchange_api__; import fusedopt"
    result = run_python(code)
    assert (
        result.stderr.strip()
        .splitlines()[-1]
        .startswith("ImportError: fusedopt needs torch 2.10 or later; this is torch")
    )


def test_unbuilt_checkout_is_one_sentence() -> None:
    code = "import sys; sys.modules['fusedopt._C'] = None; import fusedopt"
    last = run_python(code).stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fusedopt's compiled extension cannot be loaded")
    assert "pip install -e ." in last


def test_missing_compiler_is_one_sentence(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "CXX": "no-such-compiler", "FUSEDOPT_BUILD_DIR": str(tmp_path)},
    )
    assert result.returncode != 0
    assert "no C++ compiler found (CXX=no-such-compiler)" in result.stderr
    assert "Traceback" not in result.stderr
