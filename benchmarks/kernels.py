"""What a profiler says about a step's kernels: ``python benchmarks/kernels.py --ncu ncu``.

Without ``--ncu``, only takes the steps that the profiler looks at: one of each kind, after two that
warm up. Each kind is one kernel, or two when it is clipped, in the order that is printed. What the
profiler has measured goes to the file of ``--csv``, a line for each figure and a column for each
kernel; the most telling ones are printed.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import emulated  # noqa: F401
import torch

import fusedopt
from fusedopt.bench import machine
from fusedopt.bench.contenders import OPTIMIZERS, Case, Gradients
from fusedopt.models import find

BF16 = torch.bfloat16
FLOAT32 = torch.float32
LARGE = "1x100M"
# Of AdamW: model, dtype of the weights, options.
KINDS: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "float32": (LARGE, FLOAT32, {}),
    "bfloat16, remainder": (LARGE, BF16, {"weight_precision": "remainder"}),
    "8-bit state": (LARGE, FLOAT32, {"state_dtype": torch.uint8}),
    "float32, clipped": (LARGE, FLOAT32, {"max_grad_norm": 1.0}),
    "10000 tensors": ("10000x64", FLOAT32, {}),
    "bfloat16": (LARGE, BF16, {}),
    "1000 tensors": ("1000x1024", FLOAT32, {}),
    "float32, averaged": (LARGE, FLOAT32, {"ema_decay": 0.999}),
    "bfloat16 state": (LARGE, FLOAT32, {"state_dtype": BF16}),
    "bfloat16, master": (LARGE, BF16, {"weight_precision": "master"}),
    "bfloat16, clipped": (LARGE, BF16, {"max_grad_norm": 1.0}),
}
FIRST = tuple(KINDS)[:5]

SECTIONS = (
    *("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "SchedulerStats"),
    *("WarpStateStats", "InstructionStats"),
)
TELLING = re.compile(
    r"gpu__time_duration|dram__throughput.*pct|sm__throughput.*pct|registers_per_thread$"
    r"|sm__warps_active.*pct|smsp__inst_executed.sum$|dram__bytes_(read|write).sum$"
    r"|issue_stalled_\w+_per_issue_active|smsp__issue_active.*pct"
)


def take(kinds: Sequence[str], device: torch.device, model: str | None) -> None:
    """The steps, of which the profiler sees the last of each kind."""
    for kind in kinds:
        usual, dtype, options = KINDS[kind]
        case = Case(find(model or usual), OPTIMIZERS["adamw"], device, dtype)
        params = Gradients(case).parameters()
        optimizer = fusedopt.AdamW(params, **case.optimizer.options, **options)
        for _ in range(2):
            optimizer.step()
        torch.cuda.synchronize()
        print(kind, flush=True)
        torch.cuda.profiler.start()
        optimizer.step()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        del params, optimizer
        torch.cuda.empty_cache()


def turned(text: str) -> list[list[str]]:
    """The profiler's CSV, a row for each kernel, turned: a row for each figure, with its unit.

    Raises:
        ValueError: There is no kernel in it.
    """
    table = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.reader(io.StringIO("\n".join(table))))
    if len(rows) < 3:
        raise ValueError("the profiler has written of no kernel")
    names, units, *kernels = rows
    figures = [list(column) for column in zip(names, units, *kernels, strict=True)]
    named = [["kernel", "", *kernel_names(figures)]]
    return named + [row for row in figures if "__" in row[0]]


def kernel_names(figures: list[list[str]]) -> list[str]:
    """Without namespaces and arguments."""
    (names,) = (row[2:] for row in figures if row[0] == "Kernel Name")
    plain = (re.sub(r"^void |\(anonymous namespace\)::|\w+::", "", name) for name in names)
    return [re.sub(r"\([^()]*\)$", "", name) for name in plain]


def profile(ncu: str, kinds: Sequence[str], device: torch.device, output: Path | None) -> None:
    """Take the steps under the profiler, and tell what it says."""
    options = [option for section in SECTIONS for option in ("--section", section)]
    # The clocks stay as they are.
    options += ["--clock-control", "none", "--profile-from-start", "off"]
    options += ["--csv", "--page", "raw", "--print-units", "base"]
    steps = [sys.executable, __file__, "--device", device.type, "--kind", *kinds]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        code = subprocess.run([ncu, *options, "--log-file", log, *steps]).returncode
        text = log.read_text(errors="replace") if log.exists() else ""
    try:
        rows = turned(text)
    except ValueError as error:
        sys.exit(f"kernels: {error} (it ended with {code}):\n{text[-2000:]}")
    found = machine.environment(device)
    found["commit"] = os.environ.get("GPU_REPORT_COMMIT") or found["commit"]
    facts = {key: found.get(key) for key in ("date", "commit", "gpu", "driver")}
    facts |= {"torch": torch.__version__, "steps": "; ".join(kinds)}
    if output is not None:
        with output.open("w", newline="") as file:
            csv.writer(file).writerows([*([key, value] for key, value in facts.items()), *rows])
    for row in rows[:1] + [row for row in rows if TELLING.search(row[0])]:
        print(f"{row[0]:<64}{row[1]:<12}" + "".join(f"{value[:18]:>20}" for value in row[2:]))
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "fake"), default="cuda")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(FIRST))
    parser.add_argument("--model", help="instead of each kind's own")
    parser.add_argument("--ncu", metavar="PROGRAM", help="the profiler, to look at them")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all it says here")
    options = parser.parse_args(arguments)
    device = torch.device(options.device, 0)
    if options.ncu:
        profile(options.ncu, options.kind, device, options.csv)
    else:
        take(options.kind, device, options.model)


if __name__ == "__main__":
    main()
