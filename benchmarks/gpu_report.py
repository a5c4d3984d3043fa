"""Everything that needs a GPU, in one call (``make gpu-report``).

Builds the extension in place for this GPU, runs the tests on it, measures it against torch and
other libraries, looks for bad memory accesses and races, and asks the profiler about the kernels.

    python benchmarks/gpu_report.py                  # all parts
    python benchmarks/gpu_report.py bench pipeline   # the build, and these

    GPU_REPORT_DIR       where the report goes (default: build/gpu-report)
    GPU_REPORT_SECONDS   how long it may take (default: 540)

Leaves ``report.json`` and ``report.txt``, how the parts ended; ``log.txt``, all that was printed;
and a JSON file of each part that measures. They are written anew after each part, and a part that
fails or takes too long does not keep the others from being run. Needs no network: only nvcc and a
Python with torch, pybind11, ninja, setuptools (77 or later) and pytest. (pytest-xdist, where it is,
saves minutes.)
"""

from __future__ import annotations

import importlib.util
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
GRACE = 15  # seconds that a part which has taken too long gets to say how far it came

# Without the options of pyproject.toml, some of which are of plugins that need not be there.
PYTEST = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
# A subset: under the sanitizer kernels are many times slower.
SANITIZED = "same_as_on_the_cpu and (AdamW or Momentum) or resumes_to_the_bit or other_forms"
FUSEDOPT = [sys.executable, "-m", "fusedopt"]

ALWAYS = ("gpu", "build", "info")


def tests(*names: str) -> list[str]:
    return [*PYTEST, "--device", "cuda", *(f"tests/test_{name}.py" for name in names)]


def side_by_side(*names: str) -> list[str]:
    """Tests in several processes. (Those of "device" look at all that is in the GPU's memory.)"""
    spread = importlib.util.find_spec("xdist") is not None
    return [*tests(*names), *(["-n", str(min(8, os.cpu_count() or 1))] if spread else [])]


def tool(name: str) -> str:
    """Where a program of CUDA's is."""
    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    found = [shutil.which(name, path=f"{home}/bin") for home in places if home]
    return shutil.which(name) or next(filter(None, found), name)


def sanitizer(check: str) -> list[str]:
    # torch asks for things that a driver may not have, and does without.
    options = ["--error-exitcode", "9", "--target-processes", "all", "--report-api-errors", "no"]
    command = [tool("compute-sanitizer"), *options, "--tool", check]
    return [*command, *tests("device"), "-k", SANITIZED]


def profiler() -> list[str]:
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats")
    sections += ("SchedulerStats", "WarpStateStats", "InstructionStats")
    options = [option for section in sections for option in ("--section", section)]
    # The clocks stay as they are.
    options += ["--clock-control", "none", "--profile-from-start", "off"]
    return [tool("ncu"), *options, sys.executable, "benchmarks/kernels.py"]


def bench(output: Path, models: list[str], optimizers: list[str], others: list[str]) -> list[str]:
    what = ["--model", *models, "--optimizer", *optimizers, "--clip", "--contender", *others]
    how = ["--fit", "--passes", "1", "--rounds", "15", "--json", str(output)]
    return [*FUSEDOPT, "bench", "--device", "cuda", *what, *how]


def parts(folder: Path) -> dict[str, tuple[list[str], int]]:
    """By name, a command and the seconds that it may take; the most valuable first."""

    large = ["1x1B", "gpt2-1.5b", "resnet50"]
    many = ["1000x1024", "10000x64", "465x70k-groups"]
    rules = ["sgd", "momentum", "rmsprop", "adagrad"]
    stock = ["for-loop", "foreach", "fused", "limit"]
    results = {
        name: folder / f"{name}.json"
        for name in ("bench", "pipeline", "parity", "others", "compiled")
    }
    pipeline = ["benchmarks/pipeline.py", "--device", "cuda", "--json", str(results["pipeline"])]
    return {
        "gpu": (["nvidia-smi"], 20),
        "build": ([sys.executable, "setup.py", "build_ext", "--inplace"], 180),
        "info": ([*FUSEDOPT, "info"], 60),
        "device": (tests("device"), 150),
        "bench": (bench(results["bench"], large + many, ["adamw"], stock), 150),
        "tests": (
            side_by_side(
                *("parity", "precision", "clip", "accumulate", "scaler", "average", "momentum"),
                *("options", "dropin", "layouts", "robust", "profiling"),
            ),
            200,
        ),
        "pipeline": ([sys.executable, *pipeline], 120),
        "memcheck": (sanitizer("memcheck"), 100),
        "parity": (
            [*FUSEDOPT, "parity", "--device", "cuda", "--json", str(results["parity"])],
            200,
        ),
        "ncu": (profiler(), 90),
        "others": (bench(results["others"], ["gpt2-124m"], rules, stock), 90),
        "racecheck": (sanitizer("racecheck"), 100),  # of shared memory
        "initcheck": (sanitizer("initcheck"), 100),  # of what nobody has written
        "compiled": (
            bench(results["compiled"], ["1x1B", "resnet50"], ["adamw"], ["fused", "compiled"]),
            150,
        ),
        "resources": ([*PYTEST, "-s", "tests/test_cuda_build.py"], 90),
        "training": (
            side_by_side("averaging", "best_weights", "range_test", "schedule", "stopping"),
            90,
        ),
    }


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


def table(parts: dict[str, dict[str, Any]]) -> str:
    """How they ended, to be read."""
    lines = [
        f"{name:<12}{part['seconds']:>7} s  {part['ended']:<24}{part['last line'][:90]}"
        for name, part in parts.items()
    ]
    return "\n".join(lines) + "\n"


def chosen(names: list[str], known: dict[str, tuple[list[str], int]]) -> list[str]:
    """The parts to be run, in their order."""
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"gpu-report: no part {unknown[0]!r}; there are {', '.join(known)}")
    return [name for name in known if not names or name in names or name in ALWAYS]


def main(names: list[str]) -> None:
    folder = Path(os.environ.get("GPU_REPORT_DIR") or ROOT / "build" / "gpu-report").resolve()
    known = parts(folder)
    wanted = chosen(names, known)
    arch = architecture()
    if not arch:
        sys.exit("gpu-report: nvidia-smi finds no GPU here.")
    folder.mkdir(parents=True, exist_ok=True)
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
    end = time.monotonic() + float(os.environ.get("GPU_REPORT_SECONDS") or 540) - GRACE
    ended: dict[str, dict[str, Any]] = {}
    everything = folder / "log.txt"
    everything.write_bytes(b"")
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch, "log")
        for name in wanted:
            command, most = known[name]
            start = time.monotonic()
            log.write_bytes(b"")
            if end - start < 5:
                how = "no time was left"
            elif ended.get("build", {}).get("ended", "passed") != "passed":
                how = "not run: no build"
            else:
                used = checked if name in ("memcheck", "initcheck") else environment
                how = run(command, log, min(most, end - start), used)
            output = log.read_text(errors="replace")
            with everything.open("a") as file:
                file.write(f"==== {name}: {' '.join(command)}\n{output}\n==== {how}\n\n")
            lines = output.strip().splitlines()
            ended[name] = {
                "ended": how,
                "seconds": round(time.monotonic() - start, 1),
                "last line": lines[-1] if lines else "",
                "output": lines[-200:],
            }
            (folder / "report.json").write_text(json.dumps(ended, indent=1))
            (folder / "report.txt").write_text(table(ended))
            print(table({name: ended[name]}), end="", flush=True)
    for name in ("bench", "pipeline"):  # last, where it is seen
        print("", *ended.get(name, {}).get("output", []), sep="\n")
    print(f"\n{table(ended)}\nin {folder}")
    sys.exit(any(part["ended"] != "passed" for part in ended.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
