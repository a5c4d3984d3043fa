"""Results in words: tables, CSV, and the JSON files that all of it can be had from again."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fusedopt.bench import BenchError
from fusedopt.bench.contenders import TORCH
from fusedopt.bench.machine import describe
from fusedopt.bench.race import BEST
from fusedopt.output import printable, write_whole

Row = dict[str, Any]

DRIFT = 1.2  # memory that is so many times as fast as before is another machine's
# A step takes all processors it may use, and each of its barriers waits for the slowest: where
# others ran on half of them, one of two threads had to share.
BUSY = 0.5


def load(path: Path) -> dict[str, Any]:
    """The results that a JSON file of ``fusedopt bench`` holds.

    Raises:
        BenchError: There is no such file, or it is another kind of file.
    """
    try:
        report = json.loads(path.read_text())
        _ = describe(report), report["versions"]["fusedopt"]
        for row in [*report["results"], *report.get("scaling", [])]:
            _ = row["contenders"]["ours"]
        _ = list(tables(report)), list(_csv_lines(report))  # what else is missing shows there
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BenchError(
            f"{path}: not a JSON file of fusedopt bench ({type(error).__name__}: {error})"
        ) from error
    found: dict[str, Any] = report
    return found


def label(row: Row) -> str:
    """A case's name, as tables and plots have it."""
    return f"{row['case']}, clipped" if row.get("clip") else str(row["case"])


# Titles and widths of a table's columns; what a GPU's have besides.
_COLUMNS = {"step, ms": 28, "times ours": 24, "GB/s": 9, "host, ms": 11, "extra MB": 11}
_GPU_COLUMNS = {"device, ms": 12, "launches": 10}


def _line(name: str, device: str, cells: dict[str, Any]) -> str:
    widths = _COLUMNS if device == "cpu" else _COLUMNS | _GPU_COLUMNS
    texts = (f"{cells.get(title, ''):>{width}}" for title, width in widths.items())
    return f"  {name:<18}{''.join(texts)}".rstrip()


def header(optimizer: str, device: str) -> str:
    """What stands above an optimizer's cases."""
    title = f"{optimizer}: milliseconds per step, and how many times as long as ours [10%-90%]"
    titles = {title: title for title in _COLUMNS | _GPU_COLUMNS}
    return f"\n{title}\n\n{_line('', device, titles)}"


def block(row: Row) -> str:
    """A case, a line for each of its contenders."""
    tensors = f"{row['tensors']} tensor{'s' if row['tensors'] > 1 else ''}"
    dtype = f" of {row['dtype']}" if "dtype" in row else ""
    size = f"{tensors}, {_short(row['elements']).strip()} elements{dtype}"
    title = f"{label(row)} ({size}): a step moves {_short(row['bytes_per_step'])}B"
    if "copy_gb_per_s" in row:
        rates = (f"{rate:.0f}" for rate in row["copy_gb_per_s"])
        title += f"; a copy runs at {', '.join(rates)} GB/s"
    lines = [title, *([f"  left out: {row['left_out']}"] if row.get("left_out") else [])]
    for name, found in row["contenders"].items():
        cells = {"step, ms": _spread(found["ms"], 3), "GB/s": f"{found['gb_per_s']:.1f}"}
        if name in row["time_relative_to_ours"]:
            cells["times ours"] = _spread(row["time_relative_to_ours"][name], 2)
        for title, key in (("host, ms", "host_ms"), ("device, ms", "device_ms")):
            if key in found:
                cells[title] = f"{found[key]:.3f}"
        if "launches" in found:
            cells["launches"] = str(found["launches"])
        if "extra_bytes" in found:
            cells["extra MB"] = f"{found['extra_bytes'] / 1e6:.1f}"
        lines.append(_line(name, row.get("device", "cpu"), cells))
    return "\n".join(lines)


def remarks(rows: Iterable[Row]) -> Iterator[str]:
    """What stands under an optimizer's cases: who is faster than ours, and who is absent."""
    absent: dict[str, dict[str, None]] = {}  # by reason, in the order found
    for row in rows:
        for name, why in row["absent"].items():
            absent.setdefault(why, {})[name] = None
        for name, relative in row["time_relative_to_ours"].items():
            if name not in (BEST, "limit") and relative["high"] < 1:
                yield (
                    f"{name} is faster than ours on {label(row)}: it takes "
                    f"{_spread(relative, 2)} of our time"
                )
    for why, names in absent.items():
        yield f"absent: {', '.join(names)} ({why})"


def doubts(report: dict[str, Any]) -> Iterator[str]:
    """What stands at the end when the machine was busy, or not the same throughout."""
    if report["load_average"] > BUSY * report.get("cpus", math.inf):
        yield (
            f"the machine was busy: a load average of {report['load_average']:.2f} on "
            f"{report['cpus']} processors at the start; unless that had ended, the ratios are not "
            "to be relied on"
        )
    rates = [rate for row in report["results"] for rate in row.get("copy_gb_per_s", [])]
    if rates and max(rates) > DRIFT * min(rates):
        yield (
            f"the machine changed meanwhile: a copy in memory ran at {min(rates):.0f} to "
            f"{max(rates):.0f} GB/s; ratios of another run may differ by more than the ranges"
        )


def tables(report: dict[str, Any]) -> Iterator[str]:
    """All of a report's results."""
    rows = report["results"]
    for optimizer in dict.fromkeys(row["optimizer"] for row in rows):
        mine = [row for row in rows if row["optimizer"] == optimizer]
        device = mine[0].get("device", "cpu")
        yield from (header(optimizer, device), *map(block, mine), *remarks(mine))
    points = report.get("scaling", [])
    for optimizer, against in dict.fromkeys((p["optimizer"], p["against"]) for p in points):
        yield scaling_header(optimizer, against)
        yield from (
            point(p) for p in points if (p["optimizer"], p["against"]) == (optimizer, against)
        )
    yield from doubts(report)


def scaling_header(optimizer: str, against: str) -> str:
    """What stands above a curve's points."""
    return (
        f"\n{optimizer}: milliseconds per step against the number of {against}\n\n"
        f"{against:>12}{'ours':>30}{BEST:>30}"
    )


def point(row: Row) -> str:
    """A point of a curve."""
    best = best_of_torch(row)
    found = row["contenders"]
    spreads = [_spread(found[name]["ms"], 3) if name else "" for name in ("ours", best)]
    return f"{row['at']:>12,}{spreads[0]:>30}{spreads[1]:>30}" + (f"  {best}" if best else "")


def best_of_torch(row: Row) -> str | None:
    """The name of the fastest of torch's contenders."""
    found = row["contenders"]
    names = [name for name in TORCH if name in found]
    return min(names, key=lambda name: float(found[name]["ms"]["median"]), default=None)


def write_csv(report: dict[str, Any], path: Path) -> None:
    """A line for each contender of each case; the points of curves have ``against``."""
    file = io.StringIO(newline="")
    csv.writer(file).writerows(_csv_lines(report))
    write_whole(path, printable(file.getvalue()))


def _csv_lines(report: dict[str, Any]) -> Iterator[list[Any]]:
    facts = ("optimizer", "case", "device", "dtype", "clip", "tensors", "groups", "elements")
    figures = ("gb_per_s", "rounds", "steps")
    details = ("host_ms", "device_ms", "launches", "extra_bytes")
    spread = ("median", "low", "high")
    yield [
        *("against", *facts, "bytes_per_step", "contender"),
        *(f"ms_{key}" for key in spread),
        *(f"times_ours_{key}" for key in spread),
        *(*figures, *details),
    ]
    for row in [*report["results"], *report.get("scaling", [])]:
        for name, found in row["contenders"].items():
            relative = row["time_relative_to_ours"].get(name, {})
            yield [
                row.get("against", ""),
                *(row.get(key, "") for key in (*facts, "bytes_per_step")),
                name,
                *(found["ms"][key] for key in spread),
                *(relative.get(key, "") for key in spread),
                *(found.get(key, "") for key in (*figures, *details)),
            ]


def _spread(spread: dict[str, float], digits: int) -> str:
    median, low, high = (f"{spread[key]:.{digits}f}" for key in ("median", "low", "high"))
    return f"{median} [{low}-{high}]"


def _short(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:g} "
