"""Histories keep exact numbers, and show them."""

from __future__ import annotations

import io
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import table

from fusedopt.history import BARS, History, ewma, noise, sparkline

# Histories ----------------------------------------------------------------------------------------


def awkward() -> History:
    """Gaps, nan, inf, and numbers that need all their digits."""
    history = History()
    history.append(0, train_loss=0.1 + 0.2, lr=1e-3)
    history.append(3, train_loss=math.nan)
    history.append(3, **{"val, loss": -math.inf})
    history.append(10, train_loss=math.inf, lr=5e-324)
    history.append(11)
    history.append(12, train_loss=-0.0, lr=1.7976931348623157e308)
    return history


def test_rows_and_gaps() -> None:
    history = awkward()
    assert len(history) == 5
    assert history.steps == [0, 3, 10, 11, 12]
    assert history.names == ["train_loss", "lr", "val, loss"]
    assert history["lr"] == [1e-3, None, 5e-324, None, 1.7976931348623157e308]
    assert history["val, loss"] == [None, -math.inf, None, None, None]
    assert history.points("lr") == ([0, 10, 12], [1e-3, 5e-324, 1.7976931348623157e308])
    assert "lr" in history
    assert "accuracy" not in history
    with pytest.raises(KeyError, match=r"no column 'loss'; there are \['train_loss'"):
        history["loss"]


def test_tensors_become_numbers() -> None:
    history = History()
    history.append(1, a=torch.tensor(0.1, dtype=torch.float64), b=torch.tensor(3), c=2)
    assert [history[name] for name in "abc"] == [[0.1], [3.0], [2.0]]
    assert all(type(history[name][0]) is float for name in "abc")


@table(
    "wrong",
    {
        "earlier step": ((2,), {"a": 1.0}, ValueError, "step .* last one, 5: 2"),
        "float step": ((6.0,), {"a": 1.0}, TypeError, "step is not an integer: 6.0"),
        "bool step": ((True,), {"a": 1.0}, TypeError, "step is not an integer: True"),
        "twice": ((5,), {"b": 1.0, "a": 2.0}, ValueError, "step 5 has a a already: 2.0"),
        "called step": ((6,), {"step": 1.0}, ValueError, "cannot be called step: 1.0"),
        "without a name": ((6,), {"": 1.0}, ValueError, "cannot be called '': 1.0"),
        "text": ((6,), {"b": 1.0, "a": "x"}, TypeError, "a is not a number: 'x'"),
        "None": ((6,), {"a": None}, TypeError, "a is not a number: None"),
        "vector": ((6,), {"a": torch.ones(2, device="cpu")}, TypeError, "a is not a number"),
        "twice, and long": ((5,), {"a": 10**5000}, ValueError, "has a a already: a int"),
        "half a character": ((6,), {"\ud800": 1.0}, ValueError, r"called '\\ud800', which no"),
    },
)
def test_wrong_rows_change_nothing(wrong: Any) -> None:
    args, metrics, error, message = wrong
    history = History()
    history.append(5, a=1.0)
    with pytest.raises(error, match=message):
        history.append(*args, **metrics)
    assert history.state_dict() == {"steps": [5], "columns": {"a": [1.0]}}


def bits(history: History) -> dict[str, list[str]]:
    return {name: [repr(value) for value in history[name]] for name in history.names}


@pytest.mark.parametrize("kind", ["csv", "json"])
@pytest.mark.parametrize("make", [awkward, History], ids=["awkward", "empty"])
def test_files_are_exact(kind: str, make: Callable[[], History], tmp_path: Path) -> None:
    history, path = make(), tmp_path / "history"
    getattr(history, f"to_{kind}")(path)
    back = getattr(History, f"from_{kind}")(path)
    assert back.steps == history.steps
    assert bits(back) == bits(history)
    assert back == history
    back.append(99, train_loss=0.0)
    assert back != history


def test_json_is_strict(tmp_path: Path) -> None:
    awkward().to_json(tmp_path / "history")
    text = (tmp_path / "history").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text


@table(
    "text",
    {
        "empty": "",
        "no steps": "a,b\n1,2\n",
        "ragged": "step,a\n1,2\n3\n",
        "twice": "step,a,a\n1,2,3\n",
        "words": "step,a\n1,x\n",
        "falling": "step,a\n2,1.0\n1,1.0\n",
        "no values": "step,a\n1,\n",
    },
)
def test_csv_that_is_no_history(text: str, tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"some\.csv holds no history"):
        History.from_csv(path)


@pytest.mark.parametrize("text", [b"\xff\xfe", b'step,"' + b"1" * 200_000], ids=["UTF-8", "long"])
def test_csv_that_is_no_text(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"some\.csv holds no history"):
        History.from_csv(path)


@pytest.mark.parametrize(
    "text",
    [
        *("[1]", "{}", '{"step": 1}', '{"step": ["1"], "a": []}', "", "{", "[" * 100_000),
        *('{"step": [1], "a": ["1"]}', '{"step": ["1"], "a": [1.0]}', '{"step": ["1"], "a": [[]]}'),
        '{"step": ["1"], "\\ud800": ["1"]}',
    ],
)
def test_json_that_is_no_history(text: str, tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"some\.json holds no history"):
        History.from_json(path)


def test_state_dict() -> None:
    history = awkward()
    file = io.BytesIO()
    torch.save(history.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    back = History()
    back.load_state_dict(state)
    assert back == history
    back.append(20, train_loss=1.0)  # shares nothing with what it came from
    state["steps"].append(0)
    assert len(state["columns"]["lr"]) == 5
    assert back.steps[-1] == 20
    with pytest.raises(ValueError, match="a has 2 rows, but there are 1 steps"):
        back.load_state_dict({"steps": [1], "columns": {"a": [1.0, 2.0]}})
    assert len(back) == 6


@table(
    "wrong",
    {
        "step": ({"steps": ["a"]}, TypeError, r"steps\[0\] is not an integer: 'a'"),
        "half a step": ({"steps": [0.5]}, TypeError, r"steps\[0\] is not an integer: 0.5"),
        "bool": ({"steps": [True]}, TypeError, r"steps\[0\] is not an integer: True"),
        "order": ({"steps": [2, 1]}, ValueError, r"steps must rise: \[2, 1\]"),
        "name": ({"columns": {3: [1.0]}}, TypeError, "a column's name is not a string: 3"),
        "called step": ({"columns": {"step": [1.0]}}, ValueError, r"be called step: \[1.0\]"),
        "value": ({"columns": {"a": ["x"]}}, TypeError, "a is not a number: 'x'"),
        "bytes": ({"columns": {"a": [b"1"]}}, TypeError, "a is not a number: b'1'"),
        "second column": ({"columns": {"a": [1.0], "b": [1j]}}, TypeError, "b is not a number: 1j"),
        "one step": ({"steps": 3}, TypeError, "steps is not a sequence: 3"),
        "list": ({"columns": [1.0]}, TypeError, r"columns is not a mapping: \[1.0\]"),
        "number": ({"columns": {"a": 1.0}}, TypeError, "a is not a sequence: 1.0"),
        "half": ({"columns": {"\ud800": [1.0]}}, ValueError, r"called '\\ud800'"),
    },
)
def test_a_wrong_state_changes_nothing(wrong: Any) -> None:
    change, error, message = wrong
    history = awkward()
    state = {"steps": [1], "columns": {}, **change}
    with pytest.raises(error, match=message):
        history.load_state_dict(state)
    assert history == awkward()
    with pytest.raises(ValueError, match="none of a History: it has no steps, columns"):
        history.load_state_dict({})
    with pytest.raises(TypeError, match="state_dict is none of a History: None"):
        history.load_state_dict(None)  # type: ignore[arg-type]
    assert history == awkward()


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_writing_that_fails_leaves_the_old_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "some"
    getattr(awkward(), f"to_{kind}")(path)
    before = path.read_bytes()
    wrong = awkward()
    wrong._columns["\ud800"] = [None] * 4 + [1.0]  # half of a character, which no file can hold
    with pytest.raises(UnicodeEncodeError):
        getattr(wrong, f"to_{kind}")(path)
    assert path.read_bytes() == before
    link = tmp_path / "link"
    link.symlink_to(path)
    getattr(History(), f"to_{kind}")(link)
    assert link.is_symlink()
    assert path.read_bytes() != before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link", "some"]


# Views --------------------------------------------------------------------------------------------


def test_ewma_is_the_one_of_the_definition() -> None:
    assert ewma([4.0, 2.0, 8.0], 0.5) == [4.0, 3.0, 5.5]
    assert ewma([4.0, 2.0]) == pytest.approx([4.0, 3.8])
    smooth = ewma([4.0, math.nan, 2.0, math.inf], 0.5)
    assert math.isnan(smooth[1])
    assert (smooth[0], smooth[2], smooth[3]) == (4.0, 3.0, math.inf)
    assert ewma([]) == []
    for beta in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=f"beta must be at least 0 and below 1: {beta}"):
            ewma([1.0], beta)


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_measured_beside_trend_and_jump(seed: int) -> None:
    rng = random.Random(seed)
    values = [5 - 0.001 * i - 3 * (i > 500) + rng.gauss(0, 0.1) for i in range(1000)]
    assert noise(values) == pytest.approx(0.1, rel=0.15)
    assert noise([1.0]) == 0.0


def test_sparkline() -> None:
    assert sparkline([float(i) for i in range(8)]) == BARS
    assert sparkline([float(i) for i in range(8000)], 8) == BARS
    assert sparkline([1.0, math.nan, 2.0, math.inf, -math.inf]) == "▁×█××"
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([1e308, -1e308]) == "▁▁"
    assert sparkline([math.inf, -math.inf, 1e308, 1e308], 2) == "××"
    assert sparkline([]) == ""


def test_series_of_all_kinds() -> None:
    """Iterators and tensors, too; what is no series of numbers is named."""
    loss = torch.tensor(2.0, requires_grad=True)
    assert ewma(iter([4.0, loss]), 0.5) == [4.0, 3.0]
    assert noise(iter([0.0, 0.0, 0.0])) == 0.0
    assert sparkline(value for value in (1, loss)) == "▁█"
    for function in (ewma, noise, sparkline):
        with pytest.raises(TypeError, match=r"values\[1\] is not a number: 'a'"):
            function([1.0, "a", 2.0])
        for wrong in (None, 1.0, "12", b"12"):
            with pytest.raises(TypeError, match="values is not a sequence: "):
                function(wrong)
    for width, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match=f"width .*: {width}"):
            sparkline([1.0], width)
    with pytest.raises(TypeError, match="names is not a sequence: 'lr'"):
        awkward().plot(names="lr")


def test_text() -> None:
    history = History()
    assert str(history) == "History: no steps yet"
    assert history.line() == "no steps yet"
    assert repr(history) == "History(0 rows: no columns)"
    for step in range(8):
        history.append(step, train_loss=8.0 - step)
    history.append(8, val_loss=math.nan)
    assert history.line() == f"step 8  train_loss 1 {BARS[::-1]}  val_loss nan ×"
    lines = str(history).split("\n")
    assert lines[0] == "History: 9 rows, steps 0 to 8"
    assert lines[1].split() == ["train_loss", "last", "1", "1", "to", "8", BARS[::-1]]
    assert lines[2].split() == ["val_loss", "last", "nan", "nan", "to", "nan", "×"]
    assert "\n" not in history.line()
    assert repr(history) == "History(9 rows: train_loss, val_loss)"


def test_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    history = History()
    for step in range(0, 40, 10):
        history.append(step, train_loss=float(step), lr=0.1)
    ax = Figure().add_subplot()
    assert history.plot(ax) is ax
    assert [line.get_label() for line in ax.lines] == ["train_loss"]
    assert list(ax.lines[0].get_xdata()) == [0, 10, 20, 30]
    ax = Figure().add_subplot()
    history.plot(ax, names=["lr", "train_loss"], smoothing=0.5)
    assert list(ax.lines[2].get_ydata()) == [0.0, 5.0, 12.5, 21.25]
    with matplotlib.rc_context({"backend": "Agg"}):
        from matplotlib import pyplot

        before = pyplot.get_fignums()
        with pytest.raises(KeyError, match="no column 'x'"):
            history.plot(names=["x"])
        assert pyplot.get_fignums() == before
        made = history.plot()
        assert made.get_xlabel() == "step"
        pyplot.close(made.figure)


def test_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    history = History()
    assert history._repr_html_() == "<pre>History: no steps yet</pre>"
    history.append(0, **{"<b>": 1.0})
    history.append(1, **{"<b>": 2.0})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = history._repr_html_()
    assert "&lt;b&gt;" in page
    assert "<svg" not in page
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert history._repr_html_().startswith(page + "<svg")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="plots need matplotlib: pip install matplotlib"):
        awkward().plot()
