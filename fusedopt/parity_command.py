"""``fusedopt parity``: measures parity on this machine, as a table and as a report to attach."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

import fusedopt
from fusedopt import models
from fusedopt.bench.machine import cpu_model, free_bytes
from fusedopt.cases import CASES, DTYPES, PIPELINE, Case
from fusedopt.device import has_kernels
from fusedopt.extension import build_info
from fusedopt.output import check_writable, write_whole
from fusedopt.parity import (
    LAYOUTS,
    PIPELINE_RUN_STEPS,
    RUN_STEPS,
    SINGLE_STEPS,
    SLICE,
    Layout,
    Result,
    measure,
    name_of,
)

MODEL_STEPS = 5
SMALL = 2**16  # elements of a tensor that a model is taken to have as often as it has

_DTYPES = {name_of(dtype): dtype for dtype in DTYPES}
_HEAD = ("case", "dtype", "median", "99%", "max ulp", "stock's", "99%", "max ulp", "max rel",
         "worst state", "steps", "verdict")  # fmt: skip


def add_command(commands: Any) -> None:
    """Add ``parity`` to the subparsers of the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "parity",
        help="measure how exactly the numbers are those of stock torch, on this machine",
        description="Compares every optimizer with the stock class and with float64. Exit code: 0 "
        "when all rows pass, 1 when some fail, 2 when an argument is wrong.",
    )
    names = list(dict.fromkeys(case.name for case in CASES))
    parser.add_argument(
        "--optimizer",
        nargs="+",
        type=lambda text: next((name for name in names if name.lower() == text.lower()), text),
        choices=names,
        metavar="NAME",
        help=f"of {', '.join(names)} (default: all)",
    )
    parser.add_argument("--case", metavar="TEXT", help="only cases with this text, e.g. amsgrad")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=_DTYPES,
        metavar="NAME",
        help=f"of {', '.join(_DTYPES)} (default: all; with --model its own, or float32)",
    )
    parser.add_argument("--device", type=_device, default="cpu", help="default: cpu")
    parser.add_argument(
        "--steps",
        type=_number(1),
        help=f"default: {RUN_STEPS}, or {PIPELINE_RUN_STEPS} with options that stock has not; "
        f"{SINGLE_STEPS} where each step is compared; {MODEL_STEPS} of a --model",
    )
    parser.add_argument("--seed", type=_number(0), default=0, help="of all numbers (default: 0)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--shapes",
        type=_layouts,
        default=list(LAYOUTS),
        help="such as '();0;3;17x4;100@1' (0-dim, empty, ..., 100 elements of which the first is "
        f"one behind an aligned address); default: '{';'.join(map(str, LAYOUTS))}'",
    )
    what.add_argument(
        "--model",
        help=f"its shapes: {', '.join(models.MODELS)}, a .safetensors file, a checkpoint, or "
        "module:factory",
    )
    parser.add_argument(
        "--pipeline",
        action=argparse.BooleanOptionalAction,
        help="also the options that stock has not (default: yes, but for a --model)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to a file")
    parser.set_defaults(run=lambda options: run(options, parser.error))


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        tensor = torch.zeros(1, device=device)
        tensor.item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise argparse.ArgumentTypeError(f"no device {text!r} here: {reason}") from None
    if not has_kernels(tensor):
        raise argparse.ArgumentTypeError(
            f"fusedopt has no kernels for {text!r}, torch's own would be compared with themselves; "
            "`fusedopt info` says what this build is for"
        )
    return device


def _number(least: int) -> Callable[[str], int]:
    def check(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"not a whole number from {least} on: {text!r}")
        return int(text)

    return check


def _layouts(text: str) -> list[Layout]:
    layouts = []
    for part in text.split(";"):
        found = re.fullmatch(r"\s*(\(\)|[0-9]+(?:x[0-9]+)*)(?:@([0-9]+))?\s*", part)
        if not found:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not a shape such as 17x4, 0, () or 100@1; they are separated by ;"
            )
        shape = () if found[1] == "()" else tuple(map(int, found[1].split("x")))
        layouts.append(Layout(shape, int(found[2] or 0)))
    return layouts


def run(options: argparse.Namespace, error: Callable[[str], NoReturn]) -> int:
    """Measure what the command line asks for.

    Args:
        options: The command line.
        error: Ends with a sentence about a wrong argument.

    Returns:
        The exit code.
    """
    pipeline = options.model is None if options.pipeline is None else options.pipeline
    cases = [
        case
        for case in [*CASES, *(PIPELINE if pipeline else [])]
        if options.optimizer is None or case.name in options.optimizer
    ]
    if options.case is not None:
        cases = [case for case in cases if options.case in str(case)]
        if not cases:
            error(f"argument --case: no case of these optimizers has {options.case!r} in its name")
    dtypes = list(_DTYPES) if options.dtype is None else list(dict.fromkeys(options.dtype))
    layouts = {_DTYPES[name]: options.shapes for name in dtypes}
    if options.model is not None:
        try:
            model = models.find(options.model)
        except models.ModelError as wrong:
            error(f"argument --model: {wrong}")
        layouts = layouts_of(model, layouts if options.dtype else None)
        if not layouts:
            error(
                f"argument --model: {options.model}: no parameter has one of {', '.join(_DTYPES)}"
            )
    rows = [(case, dtype) for case in cases for dtype in layouts if dtype in case.dtypes]
    if not rows:
        error("argument --dtype: none of these cases has such parameters")
    needed, free = _bytes_needed(layouts), free_bytes(options.device)
    if needed > free:
        error(
            f"argument {'--model' if options.model else '--shapes'}: that takes some "
            f"{needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
        )
    if options.json is not None:
        try:
            check_writable(options.json)  # rather now than after a minute
        except (OSError, ValueError) as wrong:
            error(f"argument --json: {options.json}: {getattr(wrong, 'strerror', wrong)}")

    steps = options.steps or (MODEL_STEPS if options.model is not None else None)
    begin = time.monotonic()
    results: list[Result] = []
    try:
        with _Output(_HEAD, [[str(case), name_of(dtype)] for case, dtype in rows]) as output:
            for case, dtype in rows:
                results.append(
                    _measure(
                        *(case, dtype, layouts[dtype]),
                        device=options.device,
                        steps=steps,
                        seed=options.seed,
                    )
                )
                output.row(cells(results[-1]))
    except KeyboardInterrupt:
        print("fusedopt parity: interrupted", file=sys.stderr)
    failed = sum(not result.passed for result in results)
    print(
        f"{len(results) - failed} of {len(results)} pass"
        + ("" if len(results) == len(rows) else f" ({len(rows) - len(results)} not measured)")
        + f": fusedopt {fusedopt.__version__} and torch {torch.__version__} on {options.device}, "
        f"seed {options.seed}, {time.monotonic() - begin:.0f} s"
    )
    if options.json is not None:
        written = report(results, options.device, options.seed, options.model, layouts)
        written["rows not measured"] = len(rows) - len(results)
        try:
            write_whole(options.json, json.dumps(written, indent=1, allow_nan=False) + "\n")
        except OSError as wrong:
            print(f"fusedopt parity: {options.json}: {wrong.strerror}", file=sys.stderr)
            return 2
    if len(results) < len(rows):
        return 130  # as shells have it for an interrupt
    return 1 if failed else 0


def _bytes_needed(layouts: dict[torch.dtype, list[Layout]]) -> int:
    """Memory for the largest slice, roughly: three contestants and float64 copies of all."""
    most = 0
    for dtype, all_ in layouts.items():
        largest = max((layout.elements + layout.offset for layout in all_), default=0)
        total = sum(layout.elements + layout.offset for layout in all_)
        most = max(most, max(largest, min(total, SLICE)) * (200 if dtype.is_complex else 100))
    return most


def _measure(case: Case, dtype: torch.dtype, layouts: Sequence[Layout], **how: Any) -> Result:
    """The result; an error is one, too: it belongs into a report."""
    try:
        return measure(case, dtype, layouts, **how)
    except Exception as error:
        first = str(error).partition("\n")[0]  # C++'s go on with a stack
        problem = f"{type(error).__name__}: {first}"
        return Result(case, dtype, dtype, 0, False, 0, problems=[problem])


def layouts_of(
    model: models.Model, dtypes: Iterable[torch.dtype] | None = None
) -> dict[torch.dtype, list[Layout]]:
    """What of a model is measured, by dtype.

    All small tensors; of larger ones each shape once, cut to its first rows where it has more
    than ``SLICE`` elements: more of the same would take long and tell nothing new.

    Args:
        model: The model.
        dtypes: In which each parameter takes part; None: its own, or float32 if it has none.
    """
    if dtypes is None and model.dtypes is None:
        dtypes = [torch.float32]
    layouts: dict[torch.dtype, list[Layout]] = {dtype: [] for dtype in dtypes or ()}
    seen = set()
    for i, shape in enumerate(model.shapes):
        own = [model.dtypes[i]] if dtypes is None and model.dtypes is not None else list(layouts)
        layout = Layout(_cut(shape))
        for dtype in own:
            if dtype in DTYPES and (layout.elements <= SMALL or (layout, dtype) not in seen):
                seen.add((layout, dtype))
                layouts.setdefault(dtype, []).append(layout)
    return layouts


def _cut(shape: models.Shape) -> models.Shape:
    """Its first rows; of rows that are too large by themselves, the first of those, and so on."""
    cut = list(shape)
    for i in range(len(cut)):
        if math.prod(cut) > SLICE:
            cut[i] = max(1, SLICE // math.prod(cut[i + 1 :]))
    return tuple(cut)


def cells(result: Result) -> list[str]:
    """A result as a row of the table."""
    numbers = ["-"] * 7
    weight = result.values.get("weight")
    if weight is not None:
        ours, stock = weight.ours, weight.stock
        numbers = [
            f"{number:.3g}"
            for number in (
                *(ours.ulp_exceeded_by(0.5), ours.ulp_exceeded_by(0.01), ours.largest_ulp),
                *(stock.ulp_exceeded_by(0.5), stock.ulp_exceeded_by(0.01), stock.largest_ulp),
                ours.largest_relative,
            )
        ]
    worst = "-"
    if name := result.worst_state:
        state = result.values[name]
        worst = f"{name} {state.ours.largest_ulp:.3g} ({state.stock.largest_ulp:.3g})"
    return [
        str(result.case),
        name_of(result.dtype),
        *numbers,
        worst,
        {True: "equal", False: "DIFFER", None: "-"}[result.counters_equal],
        "pass" if result.passed else f"FAIL: {'; '.join(result.problems)}",
    ]


class _Output:
    """The table, row by row, and a progress bar where someone watches and there is tqdm."""

    def __init__(self, head: Sequence[str], known: Sequence[Sequence[str]]) -> None:
        first = [max(len(row[i]) for row in [*known, head]) for i in range(len(known[0]))]
        self._widths = [*first, *(7, 7, 8, 7, 7, 8, 8, 35, 6)]
        self._head = head
        self._total = len(known)
        self._bar: Any = None

    def __enter__(self) -> _Output:
        if sys.stderr.isatty():
            with suppress(ImportError):
                tqdm = importlib.import_module("tqdm").tqdm
                self._bar = tqdm(total=self._total, unit="row", leave=False, file=sys.stderr)
        self._write(self._head)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def row(self, cells: Sequence[str]) -> None:
        """One more."""
        self._write(cells)
        if self._bar is not None:
            self._bar.update()

    def _write(self, cells: Sequence[str]) -> None:
        padded = [cell.ljust(width) for cell, width in zip(cells, self._widths, strict=False)]
        line = "  ".join([*padded, cells[-1]])
        if self._bar is not None:
            self._bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)


def report(
    results: Sequence[Result],
    device: torch.device,
    seed: int,
    model: str | None,
    layouts: dict[torch.dtype, list[Layout]],
) -> dict[str, Any]:
    """Everything that was measured and what with, for JSON: no inf and nan, but text."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
    failed = sum(not result.passed for result in results)
    plain: dict[str, Any] = _plain(
        {
            "fusedopt": fusedopt.__version__,
            "build": build_info(),
            "torch": torch.__version__,
            "CUDA of torch": torch.version.cuda,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": str(device),
            "device name": name,
            "threads": torch.get_num_threads(),
            "seed": seed,
            "model": model,
            "shapes": {name_of(d): [str(one) for one in all_] for d, all_ in layouts.items()},
            "rows": [result.as_json() for result in results],
            "failed": failed,
        }
    )
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, torch.dtype):
        return name_of(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
