"""Results drawn: bytes per second against the limit, and how a step's cost grows."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedopt.bench import BenchError
from fusedopt.bench.contenders import CONTENDERS
from fusedopt.bench.machine import describe
from fusedopt.bench.race import BEST
from fusedopt.bench.report import Row, best_of_torch, label
from fusedopt.output import printable, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS = "#d62728"
_OTHERS = (
    *("#c6dbef", "#9ecae1", "#4292c6", "#08519c", "#74c476", "#238b45", "#fdae6b", "#9e9ac8"),
    "#8c6d31",
)
_COLORS = dict(zip((n for n in CONTENDERS if n not in ("ours", "limit")), _OTHERS, strict=True))


def require(path: Path) -> None:
    """See whether such a file can be drawn.

    Raises:
        BenchError: It cannot.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise BenchError("plots need matplotlib: pip install matplotlib") from error
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:] not in formats:
        raise BenchError(f"{path}: plots are {', '.join(formats)}")


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw a report, a row of panels for each optimizer.

    Raises:
        BenchError: There is nothing to draw, or no way to.
    """
    require(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = dict.fromkeys(row["optimizer"] for row in report["results"])
    curves = dict.fromkeys(row["optimizer"] for row in report.get("scaling", []))
    heights = [*(3.2 for _ in bars), *(4.0 for _ in curves)]
    if not heights:
        raise BenchError("there are no results to draw")
    figure = Figure(figsize=(12, sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"fusedopt {report['versions']['fusedopt']}; {describe(report)}", fontsize=9)
    panels = iter(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    for optimizer in bars:
        rows = [row for row in report["results"] if row["optimizer"] == optimizer]
        _draw_bars(next(panels).subplots(), optimizer, rows)
    for optimizer in curves:
        rows = [row for row in report["scaling"] if row["optimizer"] == optimizer]
        kinds = list(dict.fromkeys(row["against"] for row in rows))
        all_axes = next(panels).subplots(1, len(kinds), squeeze=False)[0]
        for axes, against in zip(all_axes, kinds, strict=True):
            _draw_curve(axes, optimizer, [row for row in rows if row["against"] == against])
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format=path.suffix[1:])
    try:
        write_whole(path, picture.getvalue())
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from error


def _draw_bars(axes: Axes, optimizer: str, rows: list[Row]) -> None:
    """As in a roofline: what each achieves, under the line that memory draws."""
    present = {name for row in rows for name in row["contenders"]}
    names = [name for name in CONTENDERS if name in present and name != "limit"]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [x for x, row in enumerate(rows) if name in row["contenders"]]
        axes.bar(
            [x - 0.4 + (i + 0.5) * width for x in places],
            [rows[x]["contenders"][name]["gb_per_s"] for x in places],
            width,
            label=name,
            color=_OURS if name == "ours" else _COLORS[name],
        )
    limits = [(x, row["contenders"].get("limit")) for x, row in enumerate(rows)]
    known = [(x, found["gb_per_s"]) for x, found in limits if found]
    if known:
        axes.hlines(
            [rate for _, rate in known],
            [x - 0.45 for x, _ in known],
            [x + 0.45 for x, _ in known],
            colors="black",
            label="limit",
        )
    axes.set_xticks(range(len(rows)), [printable(label(row)) for row in rows], fontsize=8)
    axes.set_ylabel("GB/s")
    axes.set_title(f"{optimizer}: bytes that a step must move, over its time", fontsize=10)
    axes.legend(fontsize=8, ncols=len(names) + 1)
    axes.margins(y=0.2)


def _draw_curve(axes: Axes, optimizer: str, rows: list[Row]) -> None:
    against = rows[0]["against"]
    for title, color in (("ours", _OURS), (BEST, _COLORS["fused"])):
        found = [
            (row["at"], row["contenders"][name]["ms"])
            for row in rows
            if (name := "ours" if title == "ours" else best_of_torch(row))
        ]
        at = [x for x, _ in found]
        axes.plot(at, [ms["median"] for _, ms in found], "o-", ms=3, color=color, label=title)
        low, high = ([ms[key] for _, ms in found] for key in ("low", "high"))
        axes.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(
        {
            "elements": "elements of one tensor",
            "tensors": "tensors of 64 elements",
            "groups": "groups of one tensor of 64 elements",
        }.get(against, str(against))
    )
    axes.set_ylabel("milliseconds per step")
    axes.set_title(optimizer, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
