"""Everything that needs a GPU, in two short calls (``make gpu-report``).

Builds the extension in place for this GPU, unless it is there already; looks whether steps are
right, measures them against what they are meant to be, asks the profiler about the kernels, runs
the tests, and looks for bad memory accesses and races.

    python benchmarks/gpu_report.py                  # a first contact
    python benchmarks/gpu_report.py second           # what is left
    python benchmarks/gpu_report.py bench pipeline   # parts by name, in this order

    GPU_REPORT_DIR       where the report goes (default: build/gpu-report)
    GPU_REPORT_SECONDS   how long it may take (default: 340)
    GPU_REPORT_COMMIT    the sources' commit, where git cannot tell

Leaves ``report.json``, how the parts ended and on what; ``log.txt``, all that was printed; and a
file of each part that measures. They are written anew after each part, and a part that fails or
takes too long does not keep the others from being run. The last that is printed are the bars, and
how the parts ended. Needs no network: only a Python with torch, pybind11, ninja, setuptools (77 or
later) and pytest, and nvcc if there is something to build. (pytest-xdist, where it is, saves
minutes.)
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GRACE = 15  # seconds that a part which has taken too long gets to say how far it came
WORDS = 5000  # characters of what failing parts have said, at the end

# Without the options of pyproject.toml, some of which are of plugins that need not be there.
PYTEST = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
FUSEDOPT = [sys.executable, "-m", "fusedopt"]
# Under the sanitizer kernels are many times slower: all dtypes with all that a step can do,
# random rounding and what is accumulated, all forms of weights and state, and moving tables.
SANITIZED = [
    f"tests/test_device.py::test_{name}"
    for name in (
        "same_as_on_the_cpu[AdamW()]",
        "a_checkpoint_resumes_to_the_bit[AdamW]",
        "weights_in_other_forms_are_made_on_the_device",
        "gradients_that_come_and_go",
    )
]
# Of no device, whatever the default; and "device" itself, which looks at all of a GPU's memory.
NOT_SIDE_BY_SIDE = (
    *("benchmarks", "core", "cuda_build", "demo", "docs", "package", "parity_command"),
    "device",
)

ALWAYS = ("gpu", "build")
SETS = {
    "first": ("smoke", "bars", "ncu", "device", "memcheck"),
    "second": ("bars", "tests", "racecheck", "parity"),
}


def on_the_gpu(*tests: str) -> list[str]:
    return [*PYTEST, "--device", "cuda", *tests]


def side_by_side() -> list[str]:
    """All tests of steps and of what surrounds them, in several processes."""
    files = [path.name for path in sorted((ROOT / "tests").glob("test_*.py"))]
    wanted = [f"tests/{name}" for name in files if name[5:-3] not in NOT_SIDE_BY_SIDE]
    spread = importlib.util.find_spec("xdist") is not None
    return [*on_the_gpu(*wanted), *(["-n", str(min(12, os.cpu_count() or 1))] if spread else [])]


def tool(name: str) -> str:
    """Where a program of CUDA's is."""
    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    found = [shutil.which(name, path=f"{home}/bin") for home in places if home]
    return shutil.which(name) or next(filter(None, found), name)


def sanitizer(check: str) -> list[str]:
    # torch asks for things that a driver may not have, and does without.
    options = ["--error-exitcode", "9", "--target-processes", "all", "--report-api-errors", "no"]
    command = [tool("compute-sanitizer"), *options, "--tool", check]
    return [*command, *on_the_gpu(*SANITIZED)]


def bench(output: Path, models: list[str], optimizers: list[str], others: list[str]) -> list[str]:
    what = ["--model", *models, "--optimizer", *optimizers, "--clip", "--contender", *others]
    how = ["--fit", "--passes", "1", "--rounds", "15", "--json", str(output)]
    return [*FUSEDOPT, "bench", "--device", "cuda", *what, *how]


def script(name: str, *arguments: str) -> list[str]:
    return [sys.executable, f"benchmarks/{name}.py", *arguments]


def parts(folder: Path) -> dict[str, tuple[list[str], int]]:
    """By name, a command and the seconds that it may take."""
    large = ["1x1B", "gpt2-1.5b", "resnet50"]
    many = ["1000x1024", "10000x64", "465x70k-groups"]
    rules = ["sgd", "momentum", "rmsprop", "adagrad"]
    stock = ["for-loop", "foreach", "fused", "limit"]

    def results(name: str) -> str:
        return str(folder / f"{name}.json")

    parity = ["parity", "--device", "cuda", "--dtype", "float32", "bfloat16", "--steps", "20"]
    return {
        "gpu": (["nvidia-smi"], 20),
        "build": ([sys.executable, "setup.py", "build_ext", "--inplace"], 180),
        "smoke": (script("smoke", "--device", "cuda"), 45),
        "bars": (script("bars", "--seconds", "60", "--json", results("bars")), 90),
        "ncu": (script("kernels", "--ncu", tool("ncu"), "--csv", str(folder / "kernels.csv")), 75),
        "device": (on_the_gpu("tests/test_device.py"), 110),
        "memcheck": (sanitizer("memcheck"), 70),
        "tests": (side_by_side(), 150),
        "racecheck": (sanitizer("racecheck"), 70),  # of shared memory
        "parity": ([*FUSEDOPT, *parity, "--json", results("parity")], 100),
        "initcheck": (sanitizer("initcheck"), 100),  # of what nobody has written
        "bench": (bench(Path(results("bench")), large + many, ["adamw"], stock), 150),
        "pipeline": (script("pipeline", "--device", "cuda", "--json", results("pipeline")), 120),
        "others": (bench(Path(results("others")), ["gpt2-124m"], rules, stock), 90),
        "compiled": (
            bench(
                Path(results("compiled")), ["1x1B", "resnet50"], ["adamw"], ["fused", "compiled"]
            ),
            150,
        ),
        "resources": ([*PYTEST, "-s", "tests/test_cuda_build.py"], 90),
    }


def lacking() -> str:
    """What this Python has not, in a sentence, or nothing."""
    needed = ("torch", "pybind11", "ninja", "setuptools", "pytest")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"{sys.executable} has no {', '.join(missing)}." if missing else ""


def blind() -> str:
    """Why this Python's torch cannot use the GPU, in a sentence, or nothing."""
    ask = "import torch; print(torch.__version__, torch.cuda.is_available())"
    asked = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ask], capture_output=True, text=True
    )
    made, _, sees = asked.stdout.strip().partition(" ")
    if asked.returncode != 0:
        return f"torch cannot be imported: {asked.stderr.strip().splitlines()[-1]}"
    return "" if sees == "True" else f"torch {made} of {sys.executable} can use no GPU."


def first_gpu() -> dict[str, str]:
    """The first GPU's name and driver, and its architecture, such as "90"; {} without one."""
    query = ["nvidia-smi", "--query-gpu=compute_cap,driver_version,name", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True)
    except OSError:
        return {}
    found = result.stdout.split("\n")[0].split(", ", 2)
    if result.returncode != 0 or len(found) != 3:
        return {}
    return {"arch": found[0].replace(".", ""), "driver": found[1], "gpu": found[2].strip()}


def sources() -> str:
    """The digest of the sources that are here (setup.py)."""
    spec = importlib.util.spec_from_file_location("fusedopt_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    digest: str = setup.sources_digest()
    return digest


def in_place(arch: str, digest: str, folder: Path = ROOT / "fusedopt") -> bool:
    """Whether the extension that this Python imports is of these sources, and for such a GPU."""
    path = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    ask = (
        "import importlib.util as util, sys;"
        "spec = util.spec_from_file_location('fusedopt._C', sys.argv[1]);"
        "module = util.module_from_spec(spec);"
        "spec.loader.exec_module(module);"
        "print(module.SOURCES, module.cuda_architectures())"
    )
    asked = subprocess.run([sys.executable, "-c", ask, path], capture_output=True, text=True)
    made, _, archs = asked.stdout.strip().partition(" ")
    return asked.returncode == 0 and made == digest and arch in archs.split(",")


def commit() -> str | None:
    """The sources' commit, marked when files differ from it."""
    told = os.environ.get("GPU_REPORT_COMMIT")
    if told:
        return told
    ask = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(ask, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


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


def said(ended: dict[str, dict[str, Any]]) -> str:
    """The last words of parts that did not pass."""
    failing = {n: "\n".join(p["output"]) for n, p in ended.items() if p["ended"] != "passed"}
    return "".join(
        f"\n==== {name}\n{words[-WORDS // len(failing) :]}\n" for name, words in failing.items()
    )


def bars(folder: Path) -> str:
    """The table of bars, as far as they were measured."""
    try:
        found = json.loads((folder / "bars.json").read_text())
    except (OSError, ValueError):
        return ""
    return "\n".join(["", *found["table"]]) + "\n"


def chosen(names: list[str], known: dict[str, tuple[list[str], int]]) -> list[str]:
    """The parts to be run, in their order."""
    wanted: list[str] = []
    for name in names or ["first"]:
        if name not in known and name not in SETS:
            there = ", ".join([*SETS, *known])
            sys.exit(f"gpu-report: no part {name!r}; there are {there}")
        wanted += SETS.get(name, (name,))
    return list(dict.fromkeys([*(name for name in ALWAYS if name in known), *wanted]))


def main(names: list[str]) -> None:
    folder = Path(os.environ.get("GPU_REPORT_DIR") or ROOT / "build" / "gpu-report").resolve()
    known = parts(folder)
    wanted = chosen(names, known)
    end = time.monotonic() + float(os.environ.get("GPU_REPORT_SECONDS") or 340) - GRACE
    if lacking():
        sys.exit(f"gpu-report: {lacking()}")
    gpu = first_gpu()
    if not gpu:
        sys.exit("gpu-report: nvidia-smi finds no GPU here. (docs/gpu.md says what to prepare.)")
    if reason := blind():
        sys.exit(f"gpu-report: {reason}")
    digest = sources()
    of = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "sources": digest,
        **gpu,
        "torch": version("torch"),
        "python": sys.version.split()[0],
    }
    folder.mkdir(parents=True, exist_ok=True)
    if "bars" in wanted:
        (folder / "bars.json").unlink(missing_ok=True)  # of another run
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ,
        "FUSEDOPT_CUDA": "1",
        "FUSEDOPT_CUDA_ARCHS": gpu["arch"],
        "GPU_REPORT_COMMIT": of["commit"] or "",
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
    }
    # torch hands out parts of large blocks; bad accesses show at the ends of those only.
    checked = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    ended: dict[str, dict[str, Any]] = {}
    everything = folder / "log.txt"
    everything.write_text(json.dumps(of, indent=1) + "\n\n")
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch, "log")
        for name in wanted:
            command, most = known[name]
            start = time.monotonic()
            log.write_bytes(b"")
            if name == "build" and in_place(gpu["arch"], digest):
                log.write_text(f"in place, of {digest}\n")
                how = "passed"
            elif end - start < 5:
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
            (folder / "report.json").write_text(json.dumps({"of": of, "parts": ended}, indent=1))
            print(table({name: ended[name]}), end="", flush=True)
    # Last, where it is seen.
    told = bars(folder) if "bars" in ended else ""
    print(f"{said(ended)}{told}\n{table(ended)}\n{', '.join(filter(None, of.values()))}\n{folder}")
    sys.exit(any(part["ended"] != "passed" for part in ended.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
