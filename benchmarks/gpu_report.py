"""Everything that needs a GPU, in one call and within nine minutes (``make gpu-report``).

Builds the extension in place for this GPU, runs the tests on it, compares speeds, and looks for bad
memory accesses and races. Leaves ``report.json``, ``report.txt``, a table of it, and ``log.txt``,
all that was printed. They are written anew after each part, and a part that fails or takes too long
does not keep the others from being run. Needs no network: only nvcc and a Python with torch,
pybind11, ninja, setuptools (77 or later) and pytest.

    GPU_REPORT_DIR   where the report goes (default: build/gpu-report)
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 520  # for all parts together
GRACE = 15  # seconds that a part which has taken too long gets to say how far it came

# Without the options of pyproject.toml, some of which are of plugins that need not be there.
PYTEST = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
# A subset: under the sanitizer kernels are many times slower.
SANITIZED = "same_as_on_the_cpu and (AdamW or Momentum) or resumes_to_the_bit or other_forms"


def tests(*names: str) -> list[str]:
    return [*PYTEST, "--device", "cuda", *(f"tests/test_{name}.py" for name in names)]


def sanitizer(tool: str) -> list[str]:
    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    found = [shutil.which("compute-sanitizer", path=f"{home}/bin") for home in places if home]
    command = shutil.which("compute-sanitizer") or next(filter(None, found), "compute-sanitizer")
    # torch asks for things that a driver may not have, and does without.
    options = ["--error-exitcode", "9", "--target-processes", "all", "--report-api-errors", "no"]
    return [command, *options, "--tool", tool, *tests("device"), "-k", SANITIZED]


def parts(bench: Path, parity: Path) -> list[tuple[str, list[str], int]]:
    """(name, command, seconds that it may take), the most valuable first."""
    fusedopt = [sys.executable, "-m", "fusedopt"]
    return [
        ("gpu", ["nvidia-smi"], 20),
        ("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 180),
        ("info", [*fusedopt, "info"], 60),
        ("tests", tests("device", "parity"), 150),
        ("bench", [sys.executable, "benchmarks/gpu.py", "--json", str(bench)], 120),
        ("parity", [*fusedopt, "parity", "--device", "cuda", "--json", str(parity)], 150),
        ("memcheck", sanitizer("memcheck"), 100),
        ("more-tests", tests("average", "momentum", "precision", "clip", "scaler"), 120),
        ("training", tests("averaging", "range_test", "stopping", "schedule"), 90),
        ("racecheck", sanitizer("racecheck"), 100),  # of shared memory
    ]


def architecture() -> str:
    """That of the first GPU, such as "90"; empty when there is none to ask."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True)
    except OSError:
        return ""
    return result.stdout.split("\n")[0].strip().replace(".", "") if result.returncode == 0 else ""


def stop(process: subprocess.Popen[bytes]) -> None:
    """As by Ctrl-C, on which ninja stops its compilers and pytest tells of its failures."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(command: list[str], log: Path, seconds: float, environment: dict[str, str]) -> str:
    """Run a part. Returns how it ended."""
    with log.open("wb") as output:
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
            stop(process)
            return f"stopped after {seconds:.0f} s"
        except BaseException:
            stop(process)
            raise
    return "passed" if code == 0 else f"failed ({code})"


def table(report: dict[str, Any]) -> str:
    """The report, to be read."""
    lines = [
        f"{name:<12}{part['seconds']:>7} s  {part['ended']:<24}{part['last line'][:90]}"
        for name, part in report["parts"].items()
    ]
    lines += ["", *report["parts"].get("bench", {}).get("output", [])]
    return "\n".join(lines) + "\n"


def main() -> None:
    folder = Path(os.environ.get("GPU_REPORT_DIR") or ROOT / "build" / "gpu-report").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    arch = architecture()
    if not arch:
        sys.exit("gpu-report: nvidia-smi finds no GPU here.")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ,
        "FUSEDOPT_CUDA": "1",
        "FUSEDOPT_CUDA_ARCHS": arch,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
    }
    # torch hands out parts of large blocks; bad accesses show at the ends of those only.
    checked = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    begin = time.monotonic()
    report: dict[str, Any] = {"parts": {}, "bench": None, "parity": None}
    everything = folder / "log.txt"
    everything.write_bytes(b"")
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch, "log")
        results = {name: Path(scratch, f"{name}.json") for name in ("bench", "parity")}
        for name, command, most in parts(**results):
            start = time.monotonic()
            left = SECONDS - GRACE - (start - begin)
            log.write_bytes(b"")
            if left < 5:
                ended = "no time was left"
            elif report["parts"].get("build", {}).get("ended", "passed") != "passed":
                ended = "not run: no build"
            else:
                ended = run(
                    command, log, min(most, left), checked if name == "memcheck" else environment
                )
            output = log.read_text(errors="replace")
            with everything.open("a") as file:
                file.write(f"==== {name}: {' '.join(command)}\n{output}\n==== {ended}\n\n")
            lines = output.strip().splitlines()
            report["parts"][name] = {
                "ended": ended,
                "seconds": round(time.monotonic() - start, 1),
                "last line": lines[-1] if lines else "",
                "output": lines[-200:],
            }
            if name in results and results[name].exists():
                report[name] = json.loads(results[name].read_text())
            (folder / "report.json").write_text(json.dumps(report, indent=1))
            (folder / "report.txt").write_text(table(report))
            print(
                table({"parts": {name: {**report["parts"][name], "output": []}}}).strip(),
                flush=True,
            )
    print(f"\n{(folder / 'report.txt').read_text()}\nin {folder}")
    sys.exit(any(part["ended"] != "passed" for part in report["parts"].values()))


if __name__ == "__main__":
    main()
