"""Early stopping, alone and with other ranks; and the best weights come back."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DEVICE, every_class_with, make_params, needs_host_memory, set_grads, table
from torch import Tensor, nn

import fusedopt
from fusedopt.cases import Case
from fusedopt.stopping import BestWeights, EarlyStopping, Progress, StopReason

NAN, INF = math.nan, math.inf


def steps_until_stop(stopper: EarlyStopping, values: list[Any]) -> int | None:
    """The number of the step that says stop; None when none does."""
    for value in values:
        step = stopper.steps
        if stopper.step(value):
            return step
    return None


# Early stopping ---------------------------------------------------------------------------------


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


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


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


@table(
    "state",
    {
        "empty": {},
        "no mapping": None,
        "best weights'": {"step": None, "kept": {}},
        "reason": EarlyStopping().state_dict() | {"reason": "BORED"},
        "metrics": EarlyStopping().state_dict() | {"metrics": [1.0]},
        "progress": EarlyStopping().state_dict() | {"metrics": {"val_loss": {"mode": "min"}}},
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


# Best weights -----------------------------------------------------------------------------------

STORAGES = ("cpu", "device", "file")
every_storage = pytest.mark.parametrize("storage", STORAGES)


@pytest.fixture
def place(tmp_path: Path) -> Callable[[str], Any]:
    """What to give as storage, by name."""
    return lambda storage: tmp_path / "best.pt" if storage == "file" else storage


class Net(nn.Module):
    """Tied weights, an integer buffer, a frozen weight, an empty one, and state without tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.last = nn.Linear(4, 4)
        self.last.weight = self.first.weight
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Parameter(torch.ones(3, 2).t(), requires_grad=False)
        self.empty = nn.Parameter(torch.ones(0))
        self.extra: Any = {"note": [1, "two"]}

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator("cpu").manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 4, generator=generator, device="cpu").to(DEVICE)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def contents(*items: Any) -> Any:
    return copy.deepcopy([item.state_dict() for item in items])


def same(found: Any, expected: Any) -> bool:
    """To the bit, in nested dicts, lists and tuples."""
    if type(found) is not type(expected):
        return False
    if isinstance(found, Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(found, dict):
        return found.keys() == expected.keys() and all(
            same(v, expected[k]) for k, v in found.items()
        )
    if isinstance(found, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


@every_storage
def test_a_model_comes_back(storage: str, place: Callable[[str], Any]) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    best = BestWeights({"model": model}, storage=place(storage))
    for step in (3, 4):  # the second time into the same memory
        train(model, optimizer, 2, seed=step)
        model.extra["note"][0] = step
        expected = contents(model)
        best.save(step)
    train(model, optimizer, 2)
    model.extra["note"][0] = 9
    assert not same(contents(model), expected)
    assert best.restore() == best.step == 4
    assert same(contents(model), expected)
    assert model.first.weight is model.last.weight
    assert model.norm.num_batches_tracked.dtype == torch.int64
    train(model, optimizer, 2)
    model.extra["note"].append(3)
    best.restore()  # what was kept is not the model's own
    assert same(contents(model), expected)


def test_memory_is_allocated_once_and_tied_weights_once() -> None:
    model = Net()
    best = BestWeights({"model": model})
    best.save(0)
    kept = best.state_dict()["kept"]["model"]
    addresses = {name: t.data_ptr() for name, t in kept.items() if isinstance(t, Tensor)}
    assert addresses["first.weight"] == addresses["last.weight"]
    assert addresses["first.weight"] != model.first.weight.data_ptr()
    best.save(1)
    kept = best.state_dict()["kept"]["model"]
    assert {name: t.data_ptr() for name, t in kept.items() if isinstance(t, Tensor)} == addresses


def test_weights_that_are_no_longer_tied() -> None:
    model = Net()
    best = BestWeights({"model": model})
    best.save(0)
    model.last.weight = nn.Parameter(torch.zeros(4, 4))
    best.save(1)
    expected = contents(model)
    with torch.no_grad():
        model.first.weight.fill_(3)
        model.last.weight.fill_(4)
    best.restore()
    assert same(contents(model), expected)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "8-bit": {"state_dtype": torch.uint8},
    "ema": {"ema_decay": 0.9},
    "all": {"state_dtype": torch.uint8, "ema_decay": 0.9, "max_grad_norm": 1.0, "l1": 1e-4},
    "master": {"weight_precision": "master"},
    "kahan": {"weight_precision": "kahan"},
    "stochastic": {"weight_precision": "stochastic"},
}


@every_class_with(OPTIONS)
def test_our_optimizers_go_on_as_before(case: Case, options: dict[str, Any]) -> None:
    """From the best step on, the same again: parameters, all state, and random bits."""
    dtype = torch.bfloat16 if "weight_precision" in options else torch.float32
    params = nn.ParameterList(make_params([(300, 5), (17,), ()], dtype))
    optimizer = case.ours(params.parameters(), **options)
    best = BestWeights({"model": params, "optimizer": optimizer})
    results = []
    for step in range(4):
        set_grads(list(params), step)
        optimizer.step()
    best.save(3)
    kept = contents(params, optimizer)
    for _ in range(2):
        assert same(contents(params, optimizer), kept)
        for step in range(4, 8):
            set_grads(list(params), step)
            optimizer.step()
        results.append(contents(params, optimizer))
        best.restore()
    assert same(*results)
    assert results[0][0]["0"].ne(kept[0]["0"]).any()


STOCK: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "AdamW-for-loop": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
    "tensor-lr": lambda p: (
        torch.optim.Adam(p, lr=torch.tensor(0.1, device=DEVICE), capturable=False)
        if DEVICE.type == "cpu"
        else torch.optim.Adam(p, lr=0.1)
    ),
}


@every_storage
@table("make", STOCK)
def test_stock_optimizers_go_on_as_before(
    make: Any, storage: str, place: Callable[[str], Any]
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    items = {"model": model, "optimizer": optimizer, "schedule": schedule}
    best = BestWeights(items, storage=place(storage))

    def run(seed: int) -> None:
        generator = torch.Generator("cpu").manual_seed(seed)
        for _ in range(2):
            x = torch.randn(8, 4, generator=generator, device="cpu").to(DEVICE)

            def closure(x: Tensor = x) -> Tensor:
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
            schedule.step()

    run(0)
    best.save(0)
    kept = contents(*items.values())
    results = []
    for _ in range(2):
        assert same(contents(*items.values()), kept)
        run(1)
        results.append(contents(*items.values()))
        best.restore()
    assert same(*results)


@every_storage
def test_the_state_before_the_first_step(storage: str, place: Callable[[str], Any]) -> None:
    """An optimizer makes its state late, and has none again."""
    model = nn.Linear(4, 2)
    optimizer = fusedopt.AdamW(model.parameters())
    best = BestWeights({"model": model, "optimizer": optimizer}, storage=place(storage))
    best.save(0)
    expected = contents(model, optimizer)
    train(model, optimizer, 2)
    best.restore()
    assert same(contents(model, optimizer), expected)
    assert not optimizer.state_dict()["state"]


def test_a_fresh_optimizer_gets_the_state() -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 2)
    best = BestWeights({"optimizer": optimizer})
    best.save(0)
    expected = contents(optimizer)
    optimizer.state.clear()
    best.restore()
    assert same(contents(optimizer), expected)
    train(model, optimizer, 2)  # with tensors of its own
    best.restore()
    assert same(contents(optimizer), expected)


@table("ended", {"normally": None, "error": ZeroDivisionError, "ctrl-c": KeyboardInterrupt})
@every_storage
def test_the_block_restores(
    storage: str, ended: type[BaseException] | None, place: Callable[[str], Any]
) -> None:
    model = nn.Linear(2, 2)

    def block() -> None:
        with BestWeights({"model": model}, storage=place(storage)) as best:
            stopper = EarlyStopping(best=best)
            for value in (3.0, 1.0, 2.0):
                nn.init.constant_(model.weight, value)
                stopper.step(value)
            if ended is not None:
                raise ended

    if ended is None:
        block()
    else:
        with pytest.raises(ended):
            block()
    assert same(model.weight.detach(), torch.full((2, 2), 1.0))


def test_nothing_saved() -> None:
    model = nn.Linear(2, 2)
    best = BestWeights({"model": model})
    with pytest.raises(RuntimeError, match="nothing to restore"):
        best.restore()
    with pytest.raises(RuntimeError, match="nothing to restore"), best:
        pass
    with pytest.raises(ZeroDivisionError), best:
        raise ZeroDivisionError


def test_the_baseline_is_not_met() -> None:
    model = nn.Linear(2, 2)
    with BestWeights({"model": model}) as best:
        stopper = EarlyStopping(best=best, baseline=0.5, patience=3)
        for value in (3.0, 1.0, 2.0):
            nn.init.constant_(model.weight, value)
            stopper.step(value)
    assert best.step == 1
    assert float(model.weight[0, 0].detach()) == 1.0


def test_an_interrupted_copy_is_not_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights at hand are the best, and what was kept is no longer whole."""
    model = nn.Linear(2, 2)
    best = BestWeights({"model": model})
    best.save(0)
    nn.init.constant_(model.weight, 7.0)

    def interrupt(*_: Any, **__: Any) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    def block() -> None:
        with best:
            monkeypatch.setattr(torch, "_foreach_copy_", interrupt)
            best.save(1)

    with pytest.raises(KeyboardInterrupt):
        block()
    assert same(model.weight.detach(), torch.full((2, 2), 7.0))
    with pytest.raises(RuntimeError, match="nothing to restore"):
        best.restore()
    best.save(1)
    assert best.restore() == 1


def test_a_save_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    best = BestWeights({"model": model}, storage=tmp_path / "best.pt")
    stopper = EarlyStopping(best=best)
    stopper.step(2.0)
    expected, before = contents(model), stopper.state_dict()
    nn.init.zeros_(model.weight)

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        stopper.step(1.0)
    assert stopper.state_dict() == before
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]
    assert best.restore() == 0
    assert same(contents(model), expected)


class Odd:
    """Has state of a class that files do not hold."""

    def __init__(self) -> None:
        self.state: Any = 0

    def state_dict(self) -> Any:
        return {"value": self.state}

    def load_state_dict(self, state: Any) -> None:
        self.state = state["value"]


def test_what_a_file_cannot_hold(tmp_path: Path) -> None:
    odd = Odd()
    best = BestWeights({"odd": odd}, storage=tmp_path / "best.pt")
    best.save(0)
    odd.state = Case("SGD", {})
    with pytest.raises(TypeError, match=r"best\.pt.*fusedopt\.cases\.Case"):
        best.save(1)
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]
    assert best.restore() == 0
    assert odd.state == 0


def test_other_containers_and_tensors() -> None:
    odd = Odd()
    odd.state = (
        {1, 2},
        [torch.ones(2), None],
        {"sub": (nn.Parameter(torch.ones(1)), Case("SGD", {}))},
    )
    best = BestWeights({"odd": odd})
    best.save(0)
    odd.state[1][0].zero_()
    odd.state[0].clear()
    odd.state[2]["sub"][0].detach().zero_()
    best.restore()
    assert odd.state[0] == {1, 2}
    assert odd.state[2]["sub"][1] == Case("SGD", {})
    assert same([odd.state[1][0], odd.state[2]["sub"][0].detach()], [torch.ones(2), torch.ones(1)])


def test_what_others_hold_is_not_written_to() -> None:
    odd = Odd()
    odd.state = mine = torch.zeros(2)
    best = BestWeights({"odd": odd})
    best.save(0)
    odd.state = later = torch.ones(2)
    best.restore()
    assert same([mine, later, odd.state], [torch.zeros(2), torch.ones(2), torch.zeros(2)])
    odd.state.fill_(5)
    best.restore()
    assert same(odd.state, torch.zeros(2))


def test_an_optimizers_state_that_is_tied_only_now() -> None:
    params = make_params([(3,), (3,)])
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    set_grads(params, 0)
    optimizer.step()
    best = BestWeights({"optimizer": optimizer})
    best.save(0)
    expected = contents(optimizer)
    first, second = (optimizer.state[p] for p in params)
    first["momentum_buffer"] = second["momentum_buffer"]
    best.restore()
    assert same(contents(optimizer), expected)


def test_state_in_another_dtype_since() -> None:
    """It comes back with all its bits, not by way of the present, narrower one."""
    params = make_params([(50,)])
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    set_grads(params, 0)
    optimizer.step()
    best = BestWeights({"optimizer": optimizer})
    best.save(0)
    expected = contents(optimizer)
    state = optimizer.state[params[0]]
    state["momentum_buffer"] = state["momentum_buffer"].bfloat16()
    best.restore()
    assert same(contents(optimizer), expected)


def change_shape(model: nn.Sequential, optimizer: Any) -> None:
    model[1].weight = nn.Parameter(torch.ones(2, 3))


def change_name(model: nn.Sequential, optimizer: Any) -> None:
    model[1].register_parameter("scale", nn.Parameter(torch.ones(2)))


def take_away(model: nn.Sequential, optimizer: Any) -> None:
    del model[1]


def add_group(model: nn.Sequential, optimizer: Any) -> None:
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def change_state(model: nn.Sequential, optimizer: Any) -> None:
    optimizer.state[model[1].weight]["momentum_buffer"] = torch.ones(3)


@table(
    "row",
    {
        "shape": (change_shape, r"model: 1\.weight has the shape \(2, 3\), but had \(2, 2\)"),
        "new": (change_name, r"model: 1\.scale was not there"),
        "gone": (take_away, r"model: 1\.weight is no longer there"),
        "group": (add_group, r"optimizer: param_groups have \[4, 1\] parameters, but had \[4\]"),
        "state": (change_state, r"optimizer: state\.2\.momentum_buffer has the shape \(3,\)"),
    },
)
@every_storage
def test_what_has_changed_since(storage: str, row: Any, place: Callable[[str], Any]) -> None:
    change, message = row
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 1)
    best = BestWeights({"model": model, "optimizer": optimizer}, storage=place(storage))
    best.save(0)
    train(model, optimizer, 1)
    change(model, optimizer)
    before = contents(model, optimizer)
    with pytest.raises(ValueError, match=message + ".*nothing was restored"):
        best.restore()
    assert same(contents(model, optimizer), before)
    best.save(1)  # which keeps it as it is now
    before = contents(model, optimizer)
    assert best.restore() == 1
    assert same(contents(model, optimizer), before)


@every_storage
def test_within_inference_mode(storage: str, place: Callable[[str], Any]) -> None:
    model = nn.Linear(4, 2)
    optimizer = fusedopt.AdamW(model.parameters(), state_dtype=torch.uint8)
    best = BestWeights({"model": model, "optimizer": optimizer}, storage=place(storage))
    train(model, optimizer, 1)
    with torch.inference_mode():
        best.save(0)
    train(model, optimizer, 1)
    best.save(1)
    expected = contents(model, optimizer)
    with torch.inference_mode():
        best.restore()
    assert same(contents(model, optimizer), expected)
    train(model, optimizer, 1)


@needs_host_memory
def test_autograd_learns_of_the_change() -> None:
    weight = nn.Parameter(torch.ones(2))
    best = BestWeights({"model": nn.ParameterList([weight])})
    best.save(0)
    loss = (weight * weight).sum()
    best.restore()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_storage
def test_resuming_with_what_is_kept(storage: str, place: Callable[[str], Any]) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 1)
    items = {"model": model, "optimizer": optimizer}
    first = BestWeights(items, storage=place(storage))
    unsaved = BestWeights(items, storage=place(storage))
    unsaved.load_state_dict(through_a_file(first.state_dict()))
    assert unsaved.step is None
    first.save(5)
    expected = contents(model, optimizer)
    checkpoint = through_a_file(first.state_dict())
    train(model, optimizer, 1)
    second = BestWeights(items, storage=place(storage))
    second.load_state_dict(checkpoint)
    assert second.restore() == 5
    assert same(contents(model, optimizer), expected)
    second.save(6)
    assert first.step == 5


def test_resuming_between_storages(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    path = tmp_path / "best.pt"
    in_memory, in_file = BestWeights({"model": model}), BestWeights({"model": model}, storage=path)
    in_memory.save(3)
    expected = contents(model)
    in_file.load_state_dict(in_memory.state_dict())
    nn.init.zeros_(model.weight)
    assert in_file.restore() == 3
    assert same(contents(model), expected)
    with pytest.raises(ValueError, match="is of a file, and storage is 'cpu'"):
        in_memory.load_state_dict(in_file.state_dict())
    path.unlink()
    with pytest.raises(ValueError, match=r"is of a file, and storage is .*best\.pt"):
        in_file.load_state_dict(in_file.state_dict())
    with pytest.raises(ValueError, match=r"of \['model'\], not of \['net'\]"):
        BestWeights({"net": model}).load_state_dict(in_memory.state_dict())


def test_resuming_when_the_file_is_of_another_step(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    path = tmp_path / "best.pt"
    best = BestWeights({"model": model}, storage=path)
    best.save(7)
    checkpoint = through_a_file(best.state_dict())
    nn.init.ones_(model.weight)
    best.save(12)
    resumed = BestWeights({"model": model}, storage=path)
    with pytest.raises(ValueError, match=r"best\.pt holds step 12.*of step 7: a later best"):
        resumed.load_state_dict(checkpoint)
    assert resumed.step is None
    nn.init.zeros_(model.weight)
    resumed.load_state_dict({**checkpoint, "step": 12})
    assert resumed.restore() == 12
    assert torch.equal(model.weight, torch.ones_like(model.weight))
    best.save(3)
    with pytest.raises(ValueError, match=r"best\.pt holds step 3.*of step 7: an older file"):
        resumed.load_state_dict(checkpoint)
    assert resumed.step == 12


@table(
    "row",
    {
        "text": ("no checkpoint at all", r"best\.pt is not what BestWeights has written: "),
        "empty": ("", r"best\.pt is not what BestWeights has written: "),
        "list": ([1], r"best\.pt is not what BestWeights has written, but holds list"),
        "a model": ({"weight": torch.ones(1)}, r"written, but holds \['weight'\]"),
        "names": (
            {"step": 7, "kept": {"net": {}}},
            r"best\.pt is of \['net'\], not of \['model'\]",
        ),
        "shapes": (
            {"step": 7, "kept": {"model": nn.Linear(3, 2).state_dict()}},
            r"best\.pt: model: weight has the shape \(2, 2\), but had \(2, 3\)",
        ),
    },
)
def test_resuming_when_the_file_holds_something_else(row: tuple[Any, str], tmp_path: Path) -> None:
    content, message = row
    path = tmp_path / "best.pt"
    if isinstance(content, str):
        path.write_text(content)
    else:
        torch.save(content, path)
    best = BestWeights({"model": nn.Linear(2, 2)}, storage=path)
    with pytest.raises(ValueError, match=message):
        best.load_state_dict({"step": 7, "kept": {}})
    assert best.step is None


def test_a_file_that_is_spoilt_before_the_restore(tmp_path: Path) -> None:
    best = BestWeights({"model": nn.Linear(2, 2)}, storage=tmp_path / "best.pt")
    best.save(0)
    (tmp_path / "best.pt").write_text("gone")
    with pytest.raises(ValueError, match=r"best\.pt is not what BestWeights has written"):
        best.restore()


@table(
    "row",
    {
        "empty": ({}, "state_dict is not that of BestWeights"),
        "no mapping": (None, "state_dict is not that of BestWeights, but has None"),
        "shapes": (
            {"net": nn.Linear(3, 2).state_dict(), "sgd": {"param_groups": [{"params": [0, 1]}]}},
            r"state_dict: net: weight has the shape \(2, 2\), but had \(2, 3\)",
        ),
        "groups": (
            {"net": nn.Linear(2, 2).state_dict(), "sgd": {"param_groups": [{"params": [0]}]}},
            r"state_dict: sgd: param_groups have \[2\] parameters, but had \[1\]",
        ),
        "no optimizer's": (
            {"net": nn.Linear(2, 2).state_dict(), "sgd": {}},
            "state_dict: sgd: an optimizer now, but was none",
        ),
    },
)
@pytest.mark.parametrize("in_file", [False, True])
def test_resuming_from_another_state(row: tuple[Any, str], in_file: bool, tmp_path: Path) -> None:
    kept, message = row
    net = nn.Linear(2, 2)
    items = {"net": net, "sgd": torch.optim.SGD(net.parameters())}
    best = BestWeights(items, storage=tmp_path / "best.pt" if in_file else "cpu")
    best.save(5)
    with pytest.raises(ValueError, match=message):
        best.load_state_dict({"step": 7, "kept": kept} if kept else kept)
    assert best.restore() == 5


def test_someone_else_wrote_the_file(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    mine, other = (BestWeights({"model": model}, storage=tmp_path / "best.pt") for _ in range(2))
    mine.save(3)
    other.save(4)
    with pytest.raises(RuntimeError, match=r"best\.pt holds step 4, not step 3"):
        mine.restore()


@table(
    "row",
    {
        "list": ([nn.Linear(1, 1)], {}, TypeError, "stateful.*Linear"),
        "empty": ({}, {}, ValueError, "stateful"),
        "name": ({1: nn.Linear(1, 1)}, {}, TypeError, "stateful.*1"),
        "tensor": ({"w": torch.ones(1)}, {}, TypeError, r"stateful\['w'\].*state_dict"),
        "storage": (
            {"m": nn.Linear(1, 1)},
            {"storage": "best.pt"},
            ValueError,
            "storage.*'best.pt'",
        ),
        "folder": (
            {"m": nn.Linear(1, 1)},
            {"storage": Path("no/such")},
            ValueError,
            "storage.*such",
        ),
        "is-folder": ({"m": nn.Linear(1, 1)}, {"storage": Path()}, ValueError, "storage"),
    },
)
def test_bad_arguments_of_best_weights(row: Any) -> None:
    stateful, options, kind, message = row
    with pytest.raises(kind, match=message):
        BestWeights(stateful, **options)


@pytest.mark.parametrize(("step", "kind"), [(-1, ValueError), (1.0, TypeError), (True, TypeError)])
def test_a_bad_step(step: Any, kind: type[Exception]) -> None:
    best = BestWeights({"model": nn.Linear(1, 1)})
    with pytest.raises(kind, match=f"step.*{step}"):
        best.save(step)
    assert best.step is None
