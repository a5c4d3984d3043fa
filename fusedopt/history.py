"""Learning curves: keep them, look at them, and say what is wrong with them.

The rules of :func:`diagnose` are in ``diagnosis.py``, the arithmetic of both in ``series.py``;
their names are to be imported from here.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from fusedopt.arguments import integer, items, number, optional, shown
from fusedopt.diagnosis import ADVICE, Finding, Thresholds, findings_of
from fusedopt.output import write_whole
from fusedopt.series import BARS, axes_for, ewma, noise, sparkline

__all__ = [
    "ADVICE",
    "BARS",
    "Finding",
    "History",
    "Thresholds",
    "diagnose",
    "ewma",
    "noise",
    "sparkline",
]


def _string(value: Any) -> str:
    """What the columns of a file are made of."""
    if not isinstance(value, str):
        raise TypeError(f"not a string: {shown(value)}")
    return value


def _check_name(name: str, values: Any) -> None:
    if name in ("step", ""):  # a file would have two columns of steps, or one without a name
        raise ValueError(f"a metric cannot be called {name or repr(name)}: {shown(values)}")
    try:
        name.encode()
    except UnicodeEncodeError:  # rather now than when all is to be saved
        raise ValueError(
            f"a metric cannot be called {name!r}, which no file or terminal can hold: "
            f"{shown(values)}"
        ) from None


class History:
    """What a training loop measures, by step: columns of numbers, with gaps.

    A row may come in parts: a second :meth:`append` with the last step adds to it. ``print`` shows
    each column with its last and lowest value and its curve; :meth:`line` is one line of text for
    a terminal; a notebook draws the curves.

    Example::

        history = History()
        for step, batch in enumerate(loader):
            ...
            history.append(step, train_loss=loss, lr=optimizer.param_groups[0]["lr"])
            print("\\r" + history.line(), end="")
    """

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._columns: dict[str, list[float | None]] = {}

    def append(self, step: int, /, **metrics: Any) -> None:
        """Add what was measured at a step.

        Args:
            step: Not below the last one.
            **metrics: Numbers, or tensors of one number. Reading a tensor waits for its device.

        Raises:
            TypeError: The step is not an integer, or a metric not a number.
            ValueError: The step lies before the last one, or its row has this metric already; or
                one is called ``step``, has no name or one that is no text (a lone surrogate in
                it), or is too large for a float.
        """
        step = integer("step", step)
        if self._steps and step < self._steps[-1]:
            raise ValueError(f"step must not lie before the last one, {self._steps[-1]}: {step!r}")
        for name in metrics:
            _check_name(name, metrics[name])
        again = bool(self._steps) and step == self._steps[-1]
        for name in metrics:
            if again and self._columns.get(name, [None])[-1] is not None:
                raise ValueError(f"step {step} has a {name} already: {shown(metrics[name])}")
        row = {name: number(name, value) for name, value in metrics.items()}
        if not again:
            self._steps.append(step)
            for column in self._columns.values():
                column.append(None)
        for name, value in row.items():
            self._columns.setdefault(name, [None] * len(self._steps))[-1] = value

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._steps)

    def __eq__(self, other: object) -> bool:
        """Whether the other one has the same rows; nan is like nan."""
        if not isinstance(other, History):
            return NotImplemented
        return self._text() == other._text()

    __hash__ = None  # type: ignore[assignment] # it changes

    @property
    def steps(self) -> list[int]:
        """The step of each row."""
        return list(self._steps)

    @property
    def names(self) -> list[str]:
        """The columns, in the order in which they came."""
        return list(self._columns)

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __getitem__(self, name: str) -> list[float | None]:
        """A column: a value for each row, None in a gap. KeyError names the columns there are."""
        return list(self._column(name))

    def points(self, name: str) -> tuple[list[int], list[float]]:
        """A column without its gaps: steps, and values."""
        pairs = zip(self._steps, self._column(name), strict=True)
        known = [(step, value) for step, value in pairs if value is not None]
        return [step for step, _ in known], [value for _, value in known]

    def _column(self, name: str) -> list[float | None]:
        try:
            return self._columns[name]
        except KeyError:
            raise KeyError(f"no column {name!r}; there are {self.names}") from None

    # Files ----------------------------------------------------------------------------------------

    def _text(self) -> dict[str, list[str]]:
        """All columns as text that gives back the exact number; nothing in a gap."""
        return {
            "step": [str(step) for step in self._steps],
            **{
                name: ["" if value is None else repr(value) for value in column]
                for name, column in self._columns.items()
            },
        }

    @classmethod
    def _from_text(cls, columns: dict[str, list[str]], source: Any) -> History:
        history = cls()
        try:
            steps = columns.pop("step")
            history.load_state_dict(
                {
                    "steps": [int(_string(step)) for step in steps],
                    "columns": {
                        name: [float(text) if _string(text) else None for text in column]
                        for name, column in columns.items()
                    },
                }
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{source} holds no history: {error}") from error
        return history

    def to_csv(self, path: str | Path) -> None:
        """Write a row for each step; numbers are exact, gaps are empty.

        An old file is replaced in one go, and stays as it is when that fails.
        """
        columns = self._text()
        file = io.StringIO(newline="")
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        write_whole(path, file.getvalue())

    @classmethod
    def from_csv(cls, path: str | Path) -> History:
        """Read what :meth:`to_csv` wrote. ValueError when it is something else."""
        try:
            with open(path, newline="", encoding="utf-8") as file:
                rows = list(csv.reader(file))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} holds no history: {error}") from error
        header = rows[0] if rows else []
        if any(len(row) != len(header) for row in rows) or len(set(header)) != len(header):
            raise ValueError(f"{path} holds no history: its rows do not fit its header {header}")
        return cls._from_text({n: [row[i] for row in rows[1:]] for i, n in enumerate(header)}, path)

    def to_json(self, path: str | Path) -> None:
        """Write an object of columns, whose numbers are strings: JSON has no nan and no inf.

        An old file is replaced as by :meth:`to_csv`.
        """
        write_whole(path, json.dumps(self._text(), ensure_ascii=False) + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> History:
        """Read what :meth:`to_json` wrote. ValueError when it is something else."""
        try:
            columns = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} holds no history: {error}") from error
        if not isinstance(columns, dict):
            raise ValueError(f"{path} holds no history: it is not an object of columns")
        return cls._from_text(columns, path)

    def state_dict(self) -> dict[str, Any]:
        """All rows, as plain numbers, for a checkpoint."""
        columns = {name: list(column) for name, column in self._columns.items()}
        return {"steps": list(self._steps), "columns": columns}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Have the rows of a :meth:`state_dict`, and no others.

        Raises:
            TypeError: A step is not an integer, a value not a number, or a name not a string; or
                the state or its columns are no mapping.
            ValueError: The rows do not fit.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict is none of a History: {shown(state_dict)}")
        missing = [name for name in ("steps", "columns") if name not in state_dict]
        if missing:
            raise ValueError(f"state_dict is none of a History: it has no {', '.join(missing)}")
        rows = items("steps", state_dict["steps"])
        steps = [integer(f"steps[{i}]", step) for i, step in enumerate(rows)]
        if not isinstance(state_dict["columns"], Mapping):
            raise TypeError(f"columns is not a mapping: {shown(state_dict['columns'])}")
        columns: dict[str, list[float | None]] = {}
        for name, values in state_dict["columns"].items():
            if not isinstance(name, str):
                raise TypeError(f"a column's name is not a string: {name!r}")
            _check_name(name, values)
            column = [optional(number)(name, value) for value in items(name, values)]
            if not any(value is not None for value in column):
                raise ValueError(f"{name} has no values: {shown(column)}")
            if len(column) != len(steps):
                raise ValueError(f"{name} has {len(column)} rows, but there are {len(steps)} steps")
            columns[name] = column
        if any(b <= a for a, b in pairwise(steps)):
            raise ValueError(f"steps must rise: {shown(steps)}")
        self._steps, self._columns = steps, columns

    # Views ----------------------------------------------------------------------------------------

    def line(self, width: int = 20) -> str:
        """One line: the last step, and each column's last value and curve.

        Args:
            width: Characters of a curve.
        """
        parts = [f"step {self._steps[-1]}" if self._steps else "no steps yet"]
        for name in self._columns:
            values = self.points(name)[1]
            parts.append(f"{name} {values[-1]:.4g} {sparkline(values, width)}")
        return "  ".join(parts)

    def __str__(self) -> str:
        """A line for each column."""
        if not self._steps:
            return "History: no steps yet"
        longest = max((len(name) for name in self._columns), default=0)
        lines = [f"History: {len(self)} rows, steps {self._steps[0]} to {self._steps[-1]}"]
        for name in self._columns:
            values = self.points(name)[1]
            finite = [value for value in values if math.isfinite(value)]
            low, high = min(finite, default=math.nan), max(finite, default=math.nan)
            lines.append(
                f"{name:<{longest}}  last {values[-1]:<10.4g} {low:>10.4g} to {high:<10.4g} "
                f"{sparkline(values)}"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"History({len(self)} rows: {', '.join(self._columns) or 'no columns'})"

    def plot(
        self, ax: Any = None, *, names: Sequence[str] | None = None, smoothing: float = 0.0
    ) -> Any:
        """Draw curves with matplotlib, on ``ax`` or a new one, and return it.

        Args:
            ax: Axes, or None.
            names: Which columns (default: those whose names end in "loss", or else all).
            smoothing: The ``beta`` of :func:`ewma`; the raw curve is then drawn faintly.
        """
        losses = [name for name in self._columns if name.endswith("loss")]
        chosen = items("names", names) if names is not None else losses or self.names
        curves = [(name, *self.points(name)) for name in chosen]  # KeyError before a figure
        ax = axes_for(ax)
        for name, steps, values in curves:
            (line,) = ax.plot(steps, ewma(values, smoothing), label=name)
            if smoothing:
                ax.plot(steps, values, alpha=0.25, color=line.get_color())
        ax.set_xlabel("step")
        if curves:
            ax.legend()
        return ax

    def _repr_html_(self) -> str:
        """For a notebook: the text, and the curves when there is matplotlib."""
        return f"<pre>{html.escape(str(self))}</pre>{self._svg()}"

    def _svg(self) -> str:
        try:
            from matplotlib.figure import Figure  # no pyplot: nothing is left to be closed
        except ImportError:
            return ""
        if not self._columns:
            return ""
        figure = Figure(figsize=(6, 3), layout="constrained")
        self.plot(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg")
        svg = file.getvalue()
        return svg[svg.index("<svg") :]


def diagnose(
    history: History,
    *,
    train: str = "train_loss",
    val: str = "val_loss",
    lr: str = "lr",
    accuracy: str = "val_accuracy",
    thresholds: Thresholds | None = None,
) -> list[Finding]:
    """What learning curves show, most severe first; an empty list when they look healthy.

    ``docs/training/curves.md`` has a table of the diagnoses. The rules look at curves only, so
    they cannot tell all: a learning rate that is far too high and one that is far too low both
    leave the loss where it was, and the noise of small batches looks like oscillation.

    Args:
        history: The curves.
        train: The training loss's column. Without it, that is said.
        val: The validation loss's. Without that column, nothing is said about validation.
        lr: The learning rate's. Without it, nothing is said about its decay.
        accuracy: A column that should rise, which tells whether training still improves things.
            Without it, the validation loss tells, or the training loss.
        thresholds: What counts as much (default: :class:`Thresholds`'s).

    Raises:
        TypeError: ``history`` is not a :class:`History`, or ``thresholds`` no :class:`Thresholds`.
    """
    if not isinstance(history, History):
        raise TypeError(f"history is not a History: {shown(history)}")
    limits = Thresholds() if thresholds is None else thresholds
    if not isinstance(limits, Thresholds):
        raise TypeError(f"thresholds is not a Thresholds: {thresholds!r}")

    def points(name: str) -> tuple[list[int], list[float]]:
        return history.points(name) if name in history else ([], [])

    found = findings_of(points, train=train, val=val, lr=lr, accuracy=accuracy, limits=limits)
    if len(history) and train not in history:  # logging more often would not help
        advice = f"There is no column {train!r}, but {history.names}: say train=, and val= as well."
        few = f"points_of_{train}"
        found = [replace(each, advice=advice) if few in each.evidence else each for each in found]
    return found
