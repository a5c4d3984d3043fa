"""``fusedopt bench``: measure steps, tell in tables, JSON, CSV and plots."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from fusedopt.bench import BenchError, plot, race, report
from fusedopt.bench.contenders import (
    CONTENDERS,
    DEFAULT_CONTENDERS,
    OPTIMIZERS,
    PEERS,
    TORCH,
    Case,
    Optimizer,
)
from fusedopt.bench.machine import describe, environment, free_bytes
from fusedopt.bench.measure import MIN_ROUNDS
from fusedopt.extension import DEVICE
from fusedopt.models import MODELS, Model, ModelError, find
from fusedopt.output import check_writable, write_whole

# What is measured unless optimizers or models are named: no adam, which is adamw but for one
# multiplication; adamw on all models up to so many elements, the others, and --quick, on a few.
DEFAULT_OPTIMIZERS = ("adamw", "sgd", "momentum", "rmsprop", "adagrad")
FEW_MODELS = ("1x50M", "resnet50", "1000x64", "1000x4096")
LARGEST = {"cpu": 200_000_000, "cuda": 2_000_000_000}
LARGEST_QUICK = 30_000_000

DTYPES = {
    str(t).removeprefix("torch."): t
    for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}
EFFORT = race.Effort(passes=2, rounds=8, budget=3.0)
QUICK = race.Effort(passes=1, rounds=4, budget=0.7)
CURVE = 6  # a curve may take as long as so many cases


def add_command(commands: Any) -> None:
    """Add ``bench`` to the subcommands of a command line."""
    about = "measure steps against stock torch's, other libraries' and the memory's speed"
    parser = commands.add_parser(
        "bench",
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        usage="%(prog)s [options]",
        epilog="docs/performance.md explains the numbers.",
    )
    parser.set_defaults(run=run)
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--model",
        nargs="+",
        action="extend",
        metavar="WHAT",
        help=f"of {', '.join(MODELS)}; or any other such number of tensors and elements; or a "
        ".safetensors file, a torch checkpoint, or "
        "module:factory, which returns a module or parameters (default: those that are not too "
        "large with adamw, some of them with other optimizers)",
    )
    what.add_argument(
        "--optimizer",
        nargs="+",
        action="extend",
        type=str.lower,
        choices=OPTIMIZERS,
        help=f"of {', '.join(OPTIMIZERS)} (default: all but adam)",
        metavar="NAME",
    )
    what.add_argument(
        "--dtype", choices=DTYPES, help="of all parameters (default: the model's own, or float32)"
    )
    what.add_argument(
        "--device", default="cpu", metavar="cpu|cuda[:i]", help="where (default: cpu)"
    )
    what.add_argument(
        "--clip", action="store_true", help="each model also with clipping by the norm"
    )
    what.add_argument(
        "--contender",
        nargs="+",
        action="extend",
        choices=[*CONTENDERS, "all"],
        metavar="NAME",
        help=f"of {', '.join(CONTENDERS)}; or all (default: all but compiled)",
    )
    what.add_argument(
        "--fit",
        action="store_true",
        help="leave out models that memory is too small for, instead of refusing",
    )
    what.add_argument(
        "--scaling",
        action="store_true",
        help="also how the time grows with the number of elements, tensors and groups",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--passes",
        type=functools.partial(_number, least=1),
        metavar="N",
        help=f"over all models, whose results are put together (default: {EFFORT.passes})",
    )
    how.add_argument(
        "--rounds",
        type=functools.partial(_number, least=MIN_ROUNDS),
        metavar="N",
        help=f"in each pass, at most (default: {EFFORT.rounds})",
    )
    how.add_argument(
        "--budget",
        type=_seconds,
        metavar="SECONDS",
        help=f"for a model in each pass, roughly (default: {EFFORT.budget:g})",
    )
    how.add_argument(
        "--quick", action="store_true", help="few rounds, and unless named few models, none large"
    )
    where = parser.add_argument_group("where results go")
    where.add_argument("--json", type=Path, metavar="FILE", help="everything, for --from")
    where.add_argument("--csv", type=Path, metavar="FILE", help="a line for each contender")
    where.add_argument("--plot", type=Path, metavar="FILE", help="drawn, as .png, .svg or .pdf")
    where.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help="measure nothing: tell what is in a JSON file",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """``fusedopt bench`` by itself, for scripts."""
    parser = argparse.ArgumentParser(prog="fusedopt")
    add_command(parser.add_subparsers())
    options = parser.parse_args(["bench", *(sys.argv[1:] if arguments is None else arguments)])
    options.run(options)


def run(options: argparse.Namespace) -> None:
    """Do what the command line says.

    Exits with 2 when that cannot be done, and with 130 when Ctrl-C has ended it.
    """
    try:
        if options.plot is not None:
            plot.require(options.plot)
        for path in (options.json, options.csv, options.plot):
            if path is not None:
                _see_whether_writable(path)
        if options.source is not None:
            found = report.load(options.source)
            print(describe(found), *report.tables(found), sep="\n")
            _write(found, options)
        else:
            found = {}
            try:
                _measure(options, found)
            except KeyboardInterrupt:
                _end_early(found, options)
        if options.plot is not None:
            plot.draw(found, options.plot)
    except (BenchError, ModelError) as error:
        print(f"fusedopt bench: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _see_whether_writable(path: Path) -> None:
    """Before hours of measuring. Leaves a file as it is, and none where there was none."""
    try:
        check_writable(path)
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise BenchError(str(error)) from error


def _end_early(found: dict[str, Any], options: argparse.Namespace) -> NoReturn:
    """Tell what was measured until now, all of it, whatever has been printed already."""
    if found.get("results") or found.get("scaling"):
        print("\ninterrupted; what was measured:", *report.tables(found), sep="\n", flush=True)
        _write(found, options)  # it may have been cut short
        if options.plot is not None:
            plot.draw(found, options.plot)
        files = [str(path) for path in (options.json, options.csv, options.plot) if path]
        where = f"what was measured is {'in ' + ', '.join(files) if files else 'above'}"
    else:
        where = "nothing was measured"
    print(f"fusedopt bench: interrupted; {where}", file=sys.stderr)
    raise SystemExit(130)


def _measure(options: argparse.Namespace, found: dict[str, Any]) -> None:
    device = _device(options.device)
    names = _contenders(options.contender)
    effort = QUICK if options.quick else EFFORT
    effort = race.Effort(
        options.passes or effort.passes,
        options.rounds or effort.rounds,
        options.budget or effort.budget,
    )
    packages = tuple(dict.fromkeys(peer.package for peer in PEERS))
    found.update(environment(device, packages), results=[])
    print(describe(found), flush=True)  # peers may have to be compiled before anything else
    cases, too_large = _cases(options, device, names)
    for line in too_large:
        print(line)

    with _bar((effort.passes + (device.type == "cuda")) * len(cases)) as bar:
        _measure_cases(cases, options, device, names, effort, found, bar)
    if options.scaling:
        found["scaling"] = []
        for optimizer in options.optimizer or DEFAULT_OPTIMIZERS[:1]:
            _measure_curves(OPTIMIZERS[optimizer], options, device, names, effort, found)
    for line in report.doubts(found):
        print(line)


def _measure_cases(
    cases: list[Case],
    options: argparse.Namespace,
    device: torch.device,
    names: list[str],
    effort: race.Effort,
    found: dict[str, Any],
    bar: Any,
) -> None:
    say = bar.write if bar else functools.partial(print, flush=True)
    measured: list[list[race.Measured]] = [[] for _ in cases]
    rows: dict[int, report.Row] = {}
    sizes = [case.bytes_of_parameters for case in cases]
    # On a GPU once more at the end, for what must not be asked before all is timed.
    sweeps = effort.passes + (device.type == "cuda")
    for number in range(1, sweeps + 1):
        last = number == sweeps
        if not bar and effort.passes > 1 and number <= effort.passes:
            print(f"pass {number} of {effort.passes}", file=sys.stderr, flush=True)
        for optimizer in dict.fromkeys(case.optimizer.name for case in cases):
            mine = [i for i, case in enumerate(cases) if case.optimizer.name == optimizer]
            if last:
                say(report.header(optimizer, device.type))
            for i in mine:
                if number <= effort.passes:
                    measured[i].append(race.measure(cases[i], names, effort))
                more: dict[str, dict[str, int]] = {}
                if last and device.type == "cuda":
                    more = {"launches": race.launches_of_steps(cases[i], measured[i][0])}
                elif last and i == sizes.index(max(sizes)) and not options.quick:
                    # It takes a process for each contender: for the largest it has to do.
                    more = {"extra_bytes": race.memory_of_steps(cases[i], measured[i][0].timings)}
                rows[i] = race.result(cases[i], measured[i], more)
                if last:
                    say(report.block(rows[i]))
                found["results"] = list(rows.values())
                _write(found, options)  # also for those who stop it
                if bar:
                    bar.update()
            if last:
                for line in report.remarks([rows[i] for i in mine]):
                    say(line)


def _measure_curves(
    optimizer: Optimizer,
    options: argparse.Namespace,
    device: torch.device,
    names: list[str],
    effort: race.Effort,
    found: dict[str, Any],
) -> None:
    names = [name for name in names if name in (*TORCH, "ours")]
    whole = effort.passes * effort.budget
    effort_each = race.Effort(1, effort.passes * effort.rounds, whole / 5)
    for against, models in race.curves().items():
        print(report.scaling_header(optimizer.name, against))
        end = time.monotonic() + CURVE * whole
        for model in models:
            case = Case(model, optimizer, device, DTYPES.get(options.dtype))
            fits = race.bytes_needed(case, names) <= free_bytes(device)
            if not fits or time.monotonic() > end:
                print(f"  stops here: {'no time' if fits else 'no memory'} for more")
                break
            row = race.result(case, [race.measure(case, names, effort_each, details=False)])
            point = {"against": against, "at": row[against], **row}
            print(report.point(point), flush=True)
            found["scaling"].append(point)
            _write(found, options)


def _cases(
    options: argparse.Namespace, device: torch.device, names: list[str]
) -> tuple[list[Case], list[str]]:
    """The cases to measure, and of those that nobody asked for what does not fit in memory."""
    named = {what: find(what) for what in dict.fromkeys(options.model or ())}
    cases, too_large = [], []
    for optimizer in dict.fromkeys(options.optimizer or DEFAULT_OPTIMIZERS):
        for model in named.values() or default_models(optimizer, device, options.quick):
            for clip in (False, True) if options.clip else (False,):
                case = Case(model, OPTIMIZERS[optimizer], device, DTYPES.get(options.dtype), clip)
                needed, free = race.bytes_needed(case, names), free_bytes(device)
                if needed <= free:
                    cases.append(case)
                    continue
                why = (
                    f"{model.name} with {optimizer} needs {needed / 1e9:.1f} GB for all "
                    f"contenders at once, and {free / 1e9:.1f} GB of memory are free"
                )
                if named and not options.fit:
                    raise BenchError(f"{why}; fewer of them (--contender) need less")
                too_large.append(f"left out: {why}")
    return cases, too_large


def default_models(optimizer: str, device: torch.device, quick: bool = False) -> list[Model]:
    """What is measured with an optimizer unless models are named."""
    most = LARGEST_QUICK if quick else LARGEST[device.type]
    names = MODELS if optimizer in ("adamw", "adam") and not quick else FEW_MODELS
    return [MODELS[name] for name in names if MODELS[name].elements <= most]


def _contenders(chosen: list[str] | None) -> list[str]:
    if chosen is None:
        return list(DEFAULT_CONTENDERS)
    return [name for name in CONTENDERS if name in (*chosen, "ours") or "all" in chosen]


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in LARGEST or (device.type == "cpu" and device.index):
        raise BenchError(f"--device {text}: it is cpu, cuda, or cuda:0 and so on")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        count = torch.cuda.device_count()
        if device.index >= count:
            raise BenchError(f"--device {text}: torch finds {count or 'no'} CUDA devices here")
        if device.type != DEVICE:
            raise BenchError(f"--device {text}: this fusedopt was built without CUDA")
        torch.cuda.set_device(device)
    return device


def _number(text: str, least: int) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from {least} on")
    return number


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of seconds")
    return number


def _bar(total: int) -> Any:
    """A progress bar, where there is somebody to see it and tqdm to draw it; or None, to enter."""
    if not sys.stderr.isatty():
        return contextlib.nullcontext()
    try:
        return importlib.import_module("tqdm").tqdm(total=total, leave=False, unit="case")
    except ImportError:
        return contextlib.nullcontext()


def _write(found: dict[str, Any], options: argparse.Namespace) -> None:
    path = options.json
    try:
        if path is not None:
            write_whole(path, json.dumps(found, indent=1) + "\n")
        path = options.csv
        if path is not None:
            report.write_csv(found, path)
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from error
