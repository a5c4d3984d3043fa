"""Early stopping, alone and with other ranks."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import table, through_a_file
from torch import nn

import fusedopt
from fusedopt.stopping import EarlyStopping, Progress, StopReason

NAN, INF = math.nan, math.inf


def steps_until_stop(stopper: EarlyStopping, values: list[Any]) -> int | None:
    """The number of the step that says stop; None when none does."""
    for value in values:
        step = stopper.steps
        if stopper.step(value):
            return step
    return None


@table(
    "row",
    {
        # options, values, step that stops, reason, best value, best step
        "patience": ({"patience": 2}, [3, 2, 2, 2.5, 1], 3, "PATIENCE", 2, 1),
        "patience-1": ({"patience": 1}, [3, 2, 2, 1], 2, "PATIENCE", 2, 1),
        "patience-0": ({"patience": 0}, [3, 2, 2, 1], 2, "PATIENCE", 2, 1),
        "in-a-row": ({"patience": 2}, [3, 4, 2, 3, 1, 2], None, "NOT_STOPPED", 1, 4),
        "max": ({"patience": 2, "mode": "max"}, [1, 2, 2, 1, 5], 3, "PATIENCE", 2, 1),
        "abs": ({"patience": 2, "min_delta": 0.5}, [2, 1.5, 1.5], 2, "PATIENCE", 2, 0),
        "abs-adds-up": ({"patience": 3, "min_delta": 0.5}, [2, 1.75, 1.5, 1.25], None, "", 1.25, 3),
        "rel": (
            {"patience": 2, "min_delta": 0.25, "min_delta_mode": "rel"},
            [8, 6, 5, 4, 3.5],
            None,
            "",
            3.5,
            4,
        ),
        "rel-negative": (
            {"patience": 2, "min_delta": 0.01, "min_delta_mode": "rel"},
            [-1.0, -0.995, -1.005],
            2,
            "PATIENCE",
            -1.0,
            0,
        ),
        "rel-negative-max": (
            {"patience": 2, "min_delta": 0.5, "min_delta_mode": "rel", "mode": "max"},
            [-2, -1.5, -0.75],
            None,
            "",
            -0.75,
            2,
        ),
        "baseline": ({"patience": 3, "baseline": 1}, [4, 3, 2, 0.5], 2, "PATIENCE", 2, 2),
        "baseline-beaten": ({"patience": 3, "baseline": 1}, [4, 3, 0.5, 1, 1], None, "", 0.5, 2),
        "start": ({"patience": 2, "start_from": 3}, [1, 9, 9, 5, 6, 6], 5, "PATIENCE", 5, 3),
        "start-finite": ({"start_from": 3}, [1, NAN], 1, "NON_FINITE", None, None),
        "threshold": ({"stopping_threshold": 1}, [3, 2, 1], 2, "THRESHOLD", 1, 2),
        "threshold-max": (
            {"stopping_threshold": 0.9, "mode": "max"},
            [0.5, 0.95],
            1,
            "THRESHOLD",
            0.95,
            1,
        ),
        "threshold-later": (
            {"stopping_threshold": 1, "start_from": 2},
            [0.5, 0.5, 0.75],
            2,
            "THRESHOLD",
            0.75,
            2,
        ),
        "divergence": ({"divergence_threshold": 5}, [3, 5, 6], 2, "DIVERGED", 3, 0),
        "divergence-first": ({"divergence_threshold": 5}, [6], 0, "DIVERGED", None, None),
        "divergence-max": (
            {"divergence_threshold": 0.1, "mode": "max"},
            [0.3, 0.05],
            1,
            "DIVERGED",
            0.3,
            0,
        ),
        "nan": ({}, [1, NAN, 2], 1, "NON_FINITE", 1, 0),
        "inf": ({}, [1, INF], 1, "NON_FINITE", 1, 0),
        "minus-inf": ({}, [1, -INF], 1, "NON_FINITE", 1, 0),
        "all-nan": ({"check_finite": False, "patience": 3}, [NAN] * 4, 2, "PATIENCE", None, None),
        "nan-goes-on": (
            {"check_finite": False, "patience": 3},
            [NAN, -INF, 3, NAN, 2],
            None,
            "",
            2,
            4,
        ),
        "no-goal-for-inf": (
            {"check_finite": False, "stopping_threshold": 0, "patience": 3},
            [1, -INF],
            None,
            "",
            1,
            0,
        ),
        "inf-diverges": (
            {"check_finite": False, "divergence_threshold": 5},
            [1, INF],
            1,
            "DIVERGED",
            1,
            0,
        ),
    },
)
def test_decisions(row: Any) -> None:
    options, values, stop, reason, best_value, best_step = row
    stopper = EarlyStopping(**options)
    assert steps_until_stop(stopper, values) == stop
    assert stopper.reason.name == (reason or "NOT_STOPPED")
    assert stopper.should_stop == (stop is not None)
    assert (stopper.best_value, stopper.best_step) == (best_value, best_step)


def test_nan_is_no_improvement() -> None:
    """``nan > best`` is false, and an ``else`` branch once took that for an improvement."""
    stopper = EarlyStopping(check_finite=False, patience=5)
    for value, improved, num_bad in ((1.0, True, 0), (NAN, False, 1), (2.0, False, 2)):
        stopper.step(value)
        assert (stopper.improved, stopper.num_bad) == (improved, num_bad)
        assert stopper.best_value == 1.0


def test_a_step_after_a_stop_judges_anew() -> None:
    stopper = EarlyStopping(patience=1)
    assert [stopper.step(v) for v in (1.0, NAN, 2.0, 0.5)] == [False, True, True, False]
    assert stopper.reason is StopReason.NOT_STOPPED
    assert stopper.progress == {"val_loss": Progress(0.5, 3, 0)}


def test_reasons_have_messages() -> None:
    messages = [reason.message for reason in StopReason]
    assert len(set(messages)) == len(messages) == 5
    assert "patience" in StopReason.PATIENCE.message


BOTH = {"loss": "min", "accuracy": "max"}


@table(
    "row",
    {
        # options, (loss, accuracy) of each step, step that stops, reason
        "all": ({"patience": 2}, [(3, 1), (4, 2), (4, 2), (4, 2), (4, 3)], 3, "PATIENCE"),
        "any": ({"patience": 2, "require": "any"}, [(3, 1), (4, 2), (4, 3)], 2, "PATIENCE"),
        "not-at-once": ({"patience": 2}, [(3, 1), (4, 2), (4, 3), (2, 3), (2, 3)], None, ""),
        "delta-of-one": (
            {"patience": 1, "min_delta": {"accuracy": 1}},
            [(3, 1), (3, 2)],
            1,
            "PATIENCE",
        ),
        "goal-of-one": ({"stopping_threshold": {"accuracy": 2}}, [(3, 1), (9, 2)], 1, "THRESHOLD"),
        "all-goals": (
            {"stopping_threshold": {"loss": 1, "accuracy": 2}},
            [(3, 2), (1, 1), (1, 2)],
            2,
            "THRESHOLD",
        ),
        "any-goal": (
            {"stopping_threshold": {"loss": 1, "accuracy": 2}, "require": "any"},
            [(3, 1), (1, 1)],
            1,
            "THRESHOLD",
        ),
        "any-nan": ({}, [(3, 1), (2, NAN)], 1, "NON_FINITE"),
        "any-diverges": (
            {"divergence_threshold": {"accuracy": 0}},
            [(1, 1), (0, -1)],
            1,
            "DIVERGED",
        ),
        "baseline-of-one": (
            {"patience": 2, "baseline": {"accuracy": 5}, "require": "any"},
            [(3, 1), (2, 2)],
            1,
            "PATIENCE",
        ),
    },
)
def test_several_metrics(row: Any) -> None:
    options, values, stop, reason = row
    stopper = EarlyStopping(BOTH, **options)
    rows = [{"accuracy": accuracy, "loss": loss, "else": None} for loss, accuracy in values]
    assert steps_until_stop(stopper, rows) == stop
    assert stopper.reason.name == (reason or "NOT_STOPPED")


def test_the_first_of_several_metrics_decides_what_is_best() -> None:
    stopper = EarlyStopping(BOTH)
    stopper.step({"loss": 2, "accuracy": 1})
    stopper.step({"loss": 3, "accuracy": 5})
    assert not stopper.improved
    assert (stopper.best_value, stopper.best_step, stopper.num_bad) == (2.0, 0, 1)
    assert stopper.progress["accuracy"] == Progress(5.0, 1, 0)


def test_nothing_is_judged_in_a_step_that_diverges() -> None:
    stopper = EarlyStopping(BOTH, divergence_threshold={"accuracy": 0})
    stopper.step({"loss": 2, "accuracy": 1})
    before = stopper.progress
    stopper.step({"loss": 1, "accuracy": -1})
    assert not stopper.improved
    assert stopper.progress == before


@table(
    "value",
    {
        "int": 2,
        "tensor": torch.tensor(2.0),
        "tensor-of-one": torch.tensor([2], dtype=torch.int64),
        "with-gradient": torch.tensor(2.0, requires_grad=True),
        "half": torch.tensor(2.0, dtype=torch.bfloat16),
        "mapping": {"val_loss": torch.tensor(2.0), "train_loss": 1.0},
    },
)
def test_forms_of_a_metric(value: Any) -> None:
    stopper = EarlyStopping()
    assert stopper.step(value) is False
    assert stopper.best_value == 2.0
    assert type(stopper.best_value) is float


@table(
    "row",
    {
        "missing": ({}, {"loss": 1.0, "lr": 2.0}, KeyError, r"'val_loss'.*\['loss', 'lr'\]"),
        "bool": ({}, True, TypeError, "'val_loss' is not a number: True"),
        "text": ({}, "1.0", TypeError, "'val_loss' is not a number: '1.0'"),
        "none": ({}, {"val_loss": None}, TypeError, "'val_loss' is not a number: None"),
        "complex": ({}, torch.tensor(1j), TypeError, "not a number"),
        "two": ({}, torch.ones(2), ValueError, "'val_loss' has 2 elements"),
        "no-names": (
            {"monitor": BOTH},
            1.0,
            TypeError,
            r"no mapping with \['loss', 'accuracy'\]: 1.0",
        ),
        "one-of-two": ({"monitor": BOTH}, {"loss": 1.0}, KeyError, r"'accuracy'.*\['loss'\]"),
    },
)
def test_bad_metrics(row: Any) -> None:
    options, metrics, kind, message = row
    stopper = EarlyStopping(**options)
    before = stopper.state_dict()
    with pytest.raises(kind, match=message):
        stopper.step(metrics)
    assert stopper.state_dict() == before


@table(
    "row",
    {
        "monitor": ({"monitor": 3}, TypeError, "monitor.*3"),
        "monitor-list": ({"monitor": ["loss"]}, TypeError, "monitor.*loss"),
        "monitor-empty": ({"monitor": {}}, ValueError, "monitor"),
        "monitor-name": ({"monitor": {1: "min"}}, TypeError, "monitor.*1"),
        "monitor-mode": ({"monitor": {"loss": "auto"}}, ValueError, r"monitor\['loss'\].*'auto'"),
        "mode": ({"mode": "auto"}, ValueError, "mode.*'auto'"),
        "two-modes": ({"monitor": BOTH, "mode": "min"}, ValueError, "mode='min'"),
        "patience": ({"patience": -1}, ValueError, "patience.*-1"),
        "patience-float": ({"patience": 1.0}, TypeError, "patience.*1.0"),
        "patience-bool": ({"patience": True}, TypeError, "patience.*True"),
        "start": ({"start_from": -2}, ValueError, "start_from.*-2"),
        "delta": ({"min_delta": -0.1}, ValueError, "min_delta.*-0.1"),
        "delta-nan": ({"min_delta": NAN}, ValueError, "min_delta.*nan"),
        "delta-name": ({"min_delta": {"loss": 1}}, ValueError, "min_delta has 'loss'.*val_loss"),
        "delta-mode": ({"min_delta_mode": "relative"}, ValueError, "min_delta_mode.*'relative'"),
        "baseline": ({"baseline": "1"}, TypeError, "baseline.*'1'"),
        "goal": ({"stopping_threshold": NAN}, ValueError, "stopping_threshold.*nan"),
        "limit": ({"divergence_threshold": INF}, ValueError, "divergence_threshold.*inf"),
        "whose": ({"monitor": BOTH, "baseline": 1}, ValueError, "baseline must say of which"),
        "crossed": (
            {"stopping_threshold": 3, "divergence_threshold": 2},
            ValueError,
            "stopping_threshold=3.0.*divergence_threshold=2.0",
        ),
        "finite": ({"check_finite": 1}, TypeError, "check_finite.*1"),
        "require": ({"require": "most"}, ValueError, "require.*'most'"),
        "best": ({"best": nn.Linear(1, 1)}, TypeError, "best.*Linear"),
        "group": ({"process_group": 0}, TypeError, "process_group.*0"),
    },
)
def test_bad_options(row: Any) -> None:
    options, kind, message = row
    with pytest.raises(kind, match=message):
        EarlyStopping(**options)


@pytest.mark.parametrize("at", range(8))
def test_resuming_makes_no_difference(at: int) -> None:
    values = [{"loss": v, "accuracy": -v} for v in (5, 4, 6, NAN, 3, 7, 7, 7)]
    options = {"patience": 3, "check_finite": False, "min_delta": 0.5}
    whole, first, second = (EarlyStopping(BOTH, **options) for _ in range(3))
    expected = [whole.step(v) for v in values]
    found = [first.step(v) for v in values[:at]]
    second.load_state_dict(through_a_file(first.state_dict()))
    assert (second.should_stop, second.improved) == (first.should_stop, first.improved)
    found += [second.step(v) for v in values[at:]]
    assert found == expected
    assert second.state_dict() == whole.state_dict()
    assert expected[-1]


def test_resuming_keeps_the_constructors_patience() -> None:
    stopped = EarlyStopping(patience=2)
    assert steps_until_stop(stopped, [1, 2, 3]) == 2
    longer, same = EarlyStopping(patience=4), EarlyStopping(patience=2)
    same.load_state_dict(stopped.state_dict())
    assert same.reason is StopReason.PATIENCE
    longer.load_state_dict(stopped.state_dict())
    assert not longer.should_stop
    assert [longer.step(2), longer.step(2)] == [False, True]


def test_resuming_keeps_another_reason() -> None:
    stopped, resumed = EarlyStopping(), EarlyStopping()
    stopped.step(NAN)
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.reason is StopReason.NON_FINITE


@table("monitor", {"name": {"loss": "min"}, "mode": {"val_loss": "max"}, "more": BOTH})
def test_resuming_something_else(monitor: dict[str, str]) -> None:
    stopper = EarlyStopping()
    stopper.step(1.0)
    before = stopper.state_dict()
    with pytest.raises(ValueError, match="state_dict is of the metrics"):
        stopper.load_state_dict(EarlyStopping(monitor).state_dict())
    assert stopper.state_dict() == before


def progress_of(**change: Any) -> dict[str, Any]:
    """A state whose metric has got something else."""
    state = EarlyStopping().state_dict()
    state["metrics"]["val_loss"].update(change)
    return state


@table(
    "state",
    {
        "empty": {},
        "no mapping": None,
        "best weights'": {"step": None, "kept": {}},
        "reason": EarlyStopping().state_dict() | {"reason": "BORED"},
        "metrics": EarlyStopping().state_dict() | {"metrics": [1.0]},
        "progress": EarlyStopping().state_dict() | {"metrics": {"val_loss": {"mode": "min"}}},
        "steps": EarlyStopping().state_dict() | {"steps": -1},
        "half a step": EarlyStopping().state_dict() | {"steps": 0.5},
        "improved": EarlyStopping().state_dict() | {"improved": "yes"},
        "best": progress_of(best_value="1.0", best_step=0),
        "best that is nan": progress_of(best_value=NAN, best_step=0),
        "best without a step": progress_of(best_value=1.0),
        "a step without a best": progress_of(best_step=1),
        "best step": progress_of(best_value=1.0, best_step=-1),
        "count": progress_of(num_bad=None),
    },
)
def test_resuming_from_no_state_at_all(state: Any) -> None:
    stopper = EarlyStopping()
    stopper.step(1.0)
    before = stopper.state_dict()
    with pytest.raises(ValueError, match="state_dict is not that of EarlyStopping"):
        stopper.load_state_dict(state)
    assert stopper.state_dict() == before


RANK = """
import json, math, sys
import torch
from torch import distributed as dist
from fusedopt.stopping import BestWeights, EarlyStopping

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
model = torch.nn.Linear(1, 1, bias=False)
facts = {}

def run(name, values, **options):
    best = BestWeights({"model": model})
    stopper = EarlyStopping(best=best, **options)
    if name == "other state" and rank == 1:
        stopper.load_state_dict(EarlyStopping().state_dict() | {"steps": 7})
    answers = []
    for step, pair in enumerate(values):
        model.weight.data.fill_(step)
        try:
            answers.append(stopper.step(pair[rank]))
        except Exception as error:
            answers.append(type(error).__name__)
    facts[name] = [answers, stopper.reason.name, stopper.state_dict(), best.step]

nan = math.nan
run("disagree", [(1, 5), (2, 3), (0, 8), (0, 9), (9, 0)], patience=2)
run("nan on one", [(1, 1), (1, nan)])
run("nan counts", [(1, 1), (nan, 0), (0, nan)], check_finite=False, patience=2)
run("threshold", [(1, 3), (0, 1)], stopping_threshold=0.5)
run("bad on one", [(1, 1), (1, "x"), ({}, 1), (0, 0)])
run("other state", [(1, 1), (2, 2)], patience=1)
both = dist.new_group([0, 1])
groups = [dist.new_group([0]), dist.new_group([1])]
run("group", [(1, 3), (2, 2)], process_group=both)
run("group of one", [(1, 3), (2, 2)], process_group=groups[rank])
try:
    EarlyStopping(process_group=groups[1 - rank])
except TypeError as error:
    facts["not a member"] = "process_group" in str(error)
print(json.dumps(facts))
dist.destroy_process_group()
"""


def run_ranks(folder: Path) -> list[dict[str, Any]]:
    """What two processes found. They are killed when they wait for one another too long."""
    root = Path(fusedopt.__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        results = [rank.communicate(timeout=60) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, errors) in zip(ranks, results, strict=True):
        assert rank.returncode == 0, errors
    return [json.loads(output) for output, _ in results]


def test_ranks_decide_together(tmp_path: Path) -> None:
    """All that there is, in one pair of processes: to start them is what takes time."""
    first, second = run_ranks(tmp_path)
    answers = {name: fact[0] for name, fact in first.items() if name != "not a member"}
    bad = "bad on one"
    assert answers["disagree"] == [False, False, False, True, True]
    assert answers["nan on one"] == [False, True]
    assert answers["nan counts"] == [False, False, True]
    assert answers["threshold"] == [False, True]
    assert answers[bad] == [False, "RuntimeError", "KeyError", False]
    assert second[bad][0] == [False, "TypeError", "RuntimeError", False]
    assert answers["other state"] == [False, True]
    assert first["disagree"][1:] == ["PATIENCE", first["disagree"][2], 1]
    assert first["disagree"][2]["metrics"]["val_loss"]["best_value"] == 2.5
    assert first["nan on one"][1] == "NON_FINITE"
    assert first["nan on one"][3] == 0
    assert first["other state"][2]["steps"] == 2
    for name in answers.keys() - {"group of one"}:  # the same answers, reasons, states and bests
        assert first[name][1:] == second[name][1:], name
        assert first[name][0] == second[name][0] or name == bad
    alone = [
        rank["group of one"][2]["metrics"]["val_loss"]["best_value"] for rank in (first, second)
    ]
    assert alone == [1.0, 2.0]
    assert first["not a member"] is second["not a member"] is True
