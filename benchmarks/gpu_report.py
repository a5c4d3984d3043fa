"""Everything that needs a GPU, in one call and within nine minutes (``make gpu-report``).

Builds the extension in place for this GPU, runs the tests on it, compares speeds, and looks for bad
memory accesses and races. Each part leaves NAME.txt, and report.json says how it ended; a part that
fails or takes too long does not keep the others from being run. Needs no network: only a Python
with torch, pybind11, ninja, setuptools and pytest, and nvcc.

    GPU_REPORT_DIR   where the report goes (default: build/gpu-report)
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 520  # for all parts together

PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", "cuda"]
SANITIZER = ["compute-sanitizer", "--error-exitcode", "9", "--target-processes", "all"]
# A subset: under the sanitizer kernels are many times slower.
SANITIZED = [*PYTEST, "tests/test_device.py", "-k", "same_as_on_the_cpu and (AdamW or Momentum)"]


def tests(*names: str) -> list[str]:
    return [*PYTEST, *(f"tests/test_{name}.py" for name in names)]


def parts(folder: Path) -> list[tuple[str, list[str], int]]:
    """(name, command, seconds that it may take), the most valuable first."""
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    bench = [sys.executable, "benchmarks/gpu.py", "--json", str(folder / "bench.json")]
    return [
        ("gpu", ["nvidia-smi"], 20),
        ("build", build, 180),
        ("info", [sys.executable, "-m", "fusedopt", "info"], 60),
        ("tests", tests("device", "parity"), 150),
        ("bench", bench, 120),
        ("memcheck", [*SANITIZER, "--tool", "memcheck", *SANITIZED], 100),
        ("more-tests", tests("average", "momentum", "precision", "clip"), 120),
        ("racecheck", [*SANITIZER, "--tool", "racecheck", *SANITIZED], 100),
    ]


def architecture() -> str:
    """That of the first GPU, such as "90"; empty when there is none to ask."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        text = subprocess.run(query, capture_output=True, text=True).stdout
    except OSError:
        return ""
    return text.split("\n")[0].strip().replace(".", "")


def run(command: list[str], log: Path, seconds: float) -> str:
    """Run a part. Returns how it ended."""
    environment = {
        **os.environ,
        "FUSEDOPT_CUDA": "1",
        "FUSEDOPT_CUDA_ARCHS": architecture(),
        "PYTHONPATH": str(ROOT),
    }
    with log.open("w") as output:
        try:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            return f"could not be run: {error}"
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
            process.wait()
            return f"stopped after {seconds:.0f} s"
    return "passed" if code == 0 else f"failed ({code})"


def main() -> None:
    folder = Path(os.environ.get("GPU_REPORT_DIR") or ROOT / "build" / "gpu-report").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    report: dict[str, Any] = {}
    for name, command, most in parts(folder):
        start = time.monotonic()
        left = SECONDS - (start - begin)
        log = folder / f"{name}.txt"
        ended = run(command, log, min(most, left)) if left > 5 else "no time was left"
        report[name] = {"ended": ended, "seconds": round(time.monotonic() - start, 1)}
        (folder / "report.json").write_text(json.dumps(report, indent=1))
        last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
        print(
            f"{name:<12}{report[name]['seconds']:>7} s  {ended:<24}{''.join(last)[:90]}", flush=True
        )
    sys.exit(any(part["ended"] != "passed" for part in report.values()))


if __name__ == "__main__":
    main()
