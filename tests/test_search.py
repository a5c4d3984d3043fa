"""Searching in stages: what narrows, what fails, what is kept."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers import table
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from fusedopt.search import Stage, Trial, coarse_to_fine

SPACE = {
    "lr": FloatDistribution(1e-5, 1e-1, log=True),
    "decay": FloatDistribution(0.0, 1.0),
    "rounded": FloatDistribution(0.0, 1.0, step=0.1),
    "width": IntDistribution(8, 512, log=True),
    "depth": IntDistribution(1, 31, step=3),
    "kind": CategoricalDistribution(["a", "b", "c", "d"]),
}


def distance(trial: Trial) -> float:
    """From a best point that is known."""
    p = trial.params
    return (
        abs(math.log10(p["lr"]) + 3)
        + abs(p["decay"] - 0.25)
        + abs(p["rounded"] - 0.7)
        + abs(math.log2(p["width"]) - 6)
        + abs(p["depth"] - 10) / 10
        + "bacd".index(p["kind"])
    )


def test_the_second_stage_is_near_the_best_of_the_first() -> None:
    stages = [Stage(trials=30, budget=1), Stage(trials=15, budget=10, shrink=0.25)]
    result = coarse_to_fine(distance, SPACE, stages=stages, seed=3)
    coarse, fine = ([r for r in result.trials if r.stage == number] for number in (0, 1))
    assert (len(coarse), len(fine)) == (30, 15)
    best = min(coarse, key=lambda record: record.value)
    assert fine[0].params == best.params  # with the longer budget
    assert result.spaces[0] == SPACE
    narrow = result.spaces[1]
    assert narrow["lr"].high / narrow["lr"].low <= (1e4**0.25) * (1 + 1e-9)
    assert narrow["decay"].high - narrow["decay"].low <= 0.25 + 1e-9
    assert narrow["kind"].choices == (best.params["kind"],)
    for name, value in best.params.items():
        if name != "kind":
            assert SPACE[name].low <= narrow[name].low <= value <= narrow[name].high
            assert narrow[name].high <= SPACE[name].high
    for record in fine:
        assert record.outcome == "complete"
        assert record.seconds >= 0
        for name, value in record.params.items():
            assert narrow[name]._contains(narrow[name].to_internal_repr(value))
    assert result.value == min(record.value for record in fine) <= best.value
    assert coarse_to_fine(distance, SPACE, stages=stages, seed=3).trials[-1].params == (
        result.trials[-1].params
    )


def test_budgets_and_directions() -> None:
    seen: list[tuple[int, float]] = []

    def objective(trial: Trial) -> float:
        seen.append((trial.stage, trial.budget))
        return trial.params["decay"]

    stages = [Stage(trials=3, budget=1), Stage(trials=2, budget=5), Stage(trials=1, budget=50)]
    space = {"decay": SPACE["decay"]}
    result = coarse_to_fine(objective, space, stages=stages, direction="maximize")
    assert seen == [(0, 1), (0, 1), (0, 1), (1, 5), (1, 5), (2, 50)]
    # The last stage tries the best of the second, which tried the best of the first.
    assert result.value == max(record.value for record in result.trials if record.stage < 2)


def test_failed_trials_are_recorded_and_do_not_end_the_search() -> None:
    values = iter([math.nan, math.inf, 3.0, "text", 2.0])

    def objective(trial: Trial) -> float:
        value = next(values, None)
        if value is None:
            raise MemoryError("too large")
        return value

    result = coarse_to_fine(objective, SPACE, stages=[Stage(trials=6, budget=1)])
    assert [record.outcome for record in result.trials] == [
        *("failed", "failed", "complete", "failed", "complete", "failed")
    ]
    assert result.value == 2.0
    errors = [record.error for record in result.trials]
    assert errors[0] == "ValueError: the objective returned nan"
    assert errors[3] == "TypeError: the objective's value is not a number: 'text'"
    assert errors[5] == "MemoryError: too large"
    assert [record.value for record in result.trials] == [None, None, 3.0, None, 2.0, None]


def test_a_later_stage_that_fails_leaves_the_best_before() -> None:
    def objective(trial: Trial) -> float:
        if trial.stage:
            raise RuntimeError("diverged")
        return trial.params["decay"]

    stages = [Stage(trials=3, budget=1), Stage(trials=2, budget=1)]
    told = (
        r"stages\[1\] was completed \(the last: RuntimeError: diverged\); .* of stages\[0\], with"
    )
    with pytest.warns(UserWarning, match=told):
        result = coarse_to_fine(objective, SPACE, stages=stages)
    assert result.value == min(r.value for r in result.trials if r.outcome == "complete")
    assert (result.stage, len(result.trials)) == (0, 5)


def test_a_stage_in_between_that_fails() -> None:
    def objective(trial: Trial) -> float:
        if trial.stage == 1:
            raise optuna.TrialPruned
        return trial.params["decay"]

    with pytest.warns(UserWarning, match=r"stages\[1\] was completed \(the last: pruned\)"):
        result = coarse_to_fine(objective, SPACE, stages=[Stage(2, 1)] * 3)
    assert result.stage == 2
    assert result.value == min(r.value for r in result.trials if r.stage == 2)


def test_nothing_completed() -> None:
    def objective(trial: Trial) -> float:
        raise ValueError("wrong shape")

    with pytest.raises(RuntimeError, match=r"no trial was completed: ValueError: wrong shape$"):
        coarse_to_fine(objective, SPACE, stages=[Stage(trials=3, budget=1)])


def test_what_is_worse_is_pruned() -> None:
    def objective(trial: Trial) -> float:
        for step in range(5):
            trial.report(trial.params["decay"], step)
        return trial.params["decay"]

    pruner = optuna.pruners.MedianPruner(n_startup_trials=2)
    result = coarse_to_fine(objective, SPACE, stages=[Stage(trials=20, budget=5)], pruner=pruner)
    outcomes = [record.outcome for record in result.trials]
    assert set(outcomes) == {"complete", "pruned"}
    pruned = [record for record in result.trials if record.outcome == "pruned"]
    assert all(record.params["decay"] > result.value for record in pruned)


def test_an_interrupted_search_goes_on_from_its_storage(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'search.db'}"
    count = 0

    def objective(trial: Trial) -> float:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return trial.params["decay"]

    stages = [Stage(trials=5, budget=1), Stage(trials=3, budget=1)]
    with pytest.raises(KeyboardInterrupt):
        coarse_to_fine(objective, SPACE, stages=stages, storage=storage)
    result = coarse_to_fine(objective, SPACE, stages=stages, storage=storage)
    assert count == 4 + 2 + 3  # the fourth was none
    assert [record.outcome for record in result.trials].count("failed") == 1
    assert result.trials[3].error == "interrupted"
    tried = [tuple(record.params.items()) for record in result.trials if record.stage == 0]
    assert len(set(tried)) == 6
    again = coarse_to_fine(objective, SPACE, stages=stages, storage=storage)
    assert (again.params, again.value) == (result.params, result.value)
    assert count == 4 + 2 + 3  # nothing was left to try
    for other, what in (
        ({"direction": "maximize"}, "direction"),
        ({"stages": stages[:1]}, "stages"),
        ({"space": {"decay": FloatDistribution(5.0, 6.0)}}, "space"),
    ):
        arguments = {"space": SPACE, "stages": stages, "storage": storage, **other}
        with pytest.raises(ValueError, match=f"another {what}, of name='search'"):
            coarse_to_fine(objective, **arguments)


def test_the_centre_is_tried_although_it_was_interrupted(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'search.db'}"
    interrupted = False

    def objective(trial: Trial) -> float:
        nonlocal interrupted
        if trial.stage and not interrupted:
            interrupted = True
            raise KeyboardInterrupt
        return trial.params["decay"]

    stages = [Stage(trials=4, budget=1), Stage(trials=2, budget=9)]
    with pytest.raises(KeyboardInterrupt):
        coarse_to_fine(objective, SPACE, stages=stages, storage=storage)
    result = coarse_to_fine(objective, SPACE, stages=stages, storage=storage)
    coarse = min((r for r in result.trials if r.stage == 0), key=lambda record: record.value)
    fine = [r for r in result.trials if r.stage == 1 and r.outcome == "complete"]
    assert fine[0].params == coarse.params
    assert len(fine) == 2


def test_a_stage_whose_seconds_are_over_is_over(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'search.db'}"
    stages = [Stage(trials=10**6, budget=1, seconds=0.3), Stage(trials=2, budget=1)]
    first = coarse_to_fine(distance, SPACE, stages=stages, storage=storage)
    again = coarse_to_fine(distance, SPACE, stages=stages, storage=storage)
    assert len(again.trials) == len(first.trials)


def test_stages_do_not_draw_the_same_numbers() -> None:
    space = {"decay": SPACE["decay"]}
    stages = [Stage(trials=4, budget=1), Stage(trials=5, budget=1, shrink=1.0)]
    result = coarse_to_fine(lambda trial: trial.params["decay"], space, stages=stages)
    coarse, fine = (
        [r.params["decay"] for r in result.trials if r.stage == stage] for stage in (0, 1)
    )
    assert set(coarse) & set(fine) == {min(coarse)}


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_grid() -> None:
    space = {"kind": SPACE["kind"], "depth": IntDistribution(1, 3)}

    def objective(trial: Trial) -> float:
        return trial.params["depth"] + "bacd".index(trial.params["kind"])

    stages = [Stage(trials=100, budget=1), Stage(trials=100, budget=1, shrink=0.5)]
    result = coarse_to_fine(
        objective, space, stages=stages, sampler=lambda seed: optuna.samplers.BruteForceSampler()
    )
    assert [r.stage for r in result.trials].count(0) == 12
    assert result.value == 1


def test_the_centre_is_on_the_grid() -> None:
    """Optuna has 0.1 * 6 = 0.6000000000000001, and warns that this is beyond a range up to 0.6."""
    space = {"rounded": SPACE["rounded"]}
    for place in range(11):

        def objective(trial: Trial, goal: float = place / 10) -> float:
            return abs(trial.params["rounded"] - goal)

        result = coarse_to_fine(objective, space, stages=[Stage(30, 1), Stage(2, 1, shrink=0.1)])
        assert result.params == {"rounded": place / 10}
        assert result.value == 0


def test_a_stage_has_its_time() -> None:
    result = coarse_to_fine(distance, SPACE, stages=[Stage(trials=10**6, budget=1, seconds=0.3)])
    assert 0 < len(result.trials) < 10**6


def test_samplers_are_optunas(capfd: pytest.CaptureFixture[str]) -> None:
    seeds = []

    def sampler(seed: int) -> optuna.samplers.BaseSampler:
        seeds.append(seed)
        return optuna.samplers.RandomSampler(seed)

    coarse_to_fine(distance, SPACE, stages=[Stage(4, 1), Stage(2, 1)], seed=7, sampler=sampler)
    assert seeds == [7, 11]
    assert capfd.readouterr() == ("", "")  # nothing is printed
    assert optuna.logging.get_verbosity() == optuna.logging.INFO


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"trials": 0}, "trials must be at least 1: 0"),
        ({"trials": True}, "trials is not an integer: True"),
        ({"trials": 2.5}, "trials is not an integer: 2.5"),
        ({"budget": 0}, "budget must be positive: 0"),
        ({"budget": math.inf}, "budget must be finite: inf"),
        ({"shrink": 0.0}, "shrink must be above 0 and at most 1: 0.0"),
        ({"shrink": math.nan}, "shrink must be above 0 and at most 1: nan"),
        ({"seconds": -1.0}, "seconds must be positive: -1.0"),
    ],
)
def test_wrong_stages(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=sentence):
        Stage(**{"trials": 1, "budget": 1, **wrong})


@table(
    "wrong",
    {
        "objective": ({"objective": None}, TypeError, "objective is no function: None"),
        "space": ({"space": [1]}, TypeError, r"space is not a mapping of names .*: \[1\]"),
        "empty": ({"space": {}}, ValueError, "space is empty"),
        "number": ({"space": {"lr": 0.1}}, TypeError, r"space\['lr'\] is no distribution .*: 0.1"),
        "one": ({"stages": Stage(2, 1)}, TypeError, r"stages is not a sequence: Stage\("),
        "none": ({"stages": []}, ValueError, "stages is empty"),
        "no stage": ({"stages": [5]}, TypeError, r"stages\[0\] is no Stage: 5"),
        "up": ({"direction": "up"}, ValueError, "must be 'minimize' or 'maximize': 'up'"),
        "seed": ({"seed": "a"}, TypeError, "seed is not an integer: 'a'"),
        "made": (
            {"sampler": optuna.samplers.RandomSampler()},
            TypeError,
            r"sampler is not a function .* lambda seed: .*: <optuna.*RandomSampler",
        ),
        "makes": ({"sampler": lambda seed: seed}, TypeError, "made no sampler of Optuna's: 0"),
        "pruner": ({"pruner": 3}, TypeError, "pruner is no pruner of Optuna's: 3"),
        "storage": ({"storage": 5}, TypeError, "storage is no address, such as 'sqlite:.*: 5"),
        "name": ({"name": 5}, TypeError, "name is not a string: 5"),
    },
)
def test_wrong_searches(wrong: Any) -> None:
    change, error, message = wrong
    tried: list[Trial] = []
    arguments = {"objective": tried.append, "space": SPACE, **change}
    with pytest.raises(error, match=message):
        coarse_to_fine(**arguments)
    assert not tried


def test_a_storage_of_optunas() -> None:
    storage = optuna.storages.InMemoryStorage()
    for _ in range(2):
        result = coarse_to_fine(distance, SPACE, stages=iter([Stage(2, 1)]), storage=storage)
        assert len(result.trials) == 2


def test_without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match="needs optuna: pip install optuna"):
        coarse_to_fine(distance, SPACE)
