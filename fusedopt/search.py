"""Search for hyperparameters in stages: many short trials, then fewer long ones near the best.

The recipe is old: a coarse search over wide ranges, in which every trial trains for an epoch or
five, then a finer one around the best, with the training time that tells neighbours apart. Optuna
does the searching; here is what the stages add to it.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from fusedopt.arguments import (
    count,
    finite_positive,
    integer,
    items,
    number,
    optional,
    positive,
    shown,
)

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage


_ASKED, _OVER, _INTERRUPTED = "asked", "over", "interrupted"


@dataclass(frozen=True)
class Stage:
    """One stage of a search.

    Attributes:
        trials: How many, those that fail or are pruned included.
        budget: What each may spend, in whatever unit the objective understands: epochs, say.
        shrink: Width of each range relative to the stage before, around that stage's best; the
            share of the values of a categorical choice that stay. No meaning in the first stage.
        seconds: No new trial begins after so many (None: no limit).
    """

    trials: int
    budget: float
    shrink: float = 0.25
    seconds: float | None = None

    def __post_init__(self) -> None:
        count("trials", self.trials, 1)
        finite_positive("budget", self.budget)
        if not 0 < number("shrink", self.shrink) <= 1:
            raise ValueError(f"shrink must be above 0 and at most 1: {self.shrink!r}")
        optional(positive)("seconds", self.seconds)


@dataclass
class Record:
    """What became of a trial.

    Attributes:
        stage: Its stage, from 0 on.
        params: What was tried.
        value: What the objective returned; None when it failed or was pruned.
        outcome: "complete", "pruned" or "failed".
        error: Why it failed.
        seconds: How long it took.
    """

    stage: int
    params: dict[str, Any]
    value: float | None
    outcome: str
    error: str | None
    seconds: float


@dataclass
class SearchResult:
    """What a search found.

    Attributes:
        params: The best of the last stage in which a trial was completed. (Values of different
            stages had different budgets and do not compare.)
        value: Their value.
        spaces: What each stage searched.
        trials: All that was tried, in order.
        stage: The stage that ``params`` and ``value`` are of, from 0 on. The last one, unless
            none of its trials was completed, of which a warning tells.
    """

    params: dict[str, Any]
    value: float
    spaces: list[dict[str, BaseDistribution]]
    trials: list[Record]
    stage: int = 0


class Trial:
    """What an objective is given.

    Attributes:
        params: The hyperparameters to try.
        budget: What it may spend (:class:`Stage`).
        stage: The stage, from 0 on.
    """

    def __init__(self, trial: optuna.Trial, stage: int, budget: float) -> None:
        self.params = _params(trial)
        self.budget = budget
        self.stage = stage
        self._trial = trial

    def report(self, value: float, step: int) -> None:
        """Tell how it goes; ends the trial when others were better by then.

        Raises:
            optuna.TrialPruned: It is not worth going on. Let it pass.
        """
        import optuna

        self._trial.report(value, step)
        if self._trial.should_prune():
            raise optuna.TrialPruned


def coarse_to_fine(
    objective: Callable[[Trial], float],
    space: Mapping[str, BaseDistribution],
    *,
    stages: Sequence[Stage] = (Stage(trials=20, budget=2), Stage(trials=8, budget=20)),
    direction: Literal["minimize", "maximize"] = "minimize",
    seed: int = 0,
    sampler: Callable[[int], BaseSampler] | None = None,
    pruner: BasePruner | None = None,
    storage: str | BaseStorage | None = None,
    name: str = "search",
) -> SearchResult:
    """Search a space coarsely, then ever finer around the best.

    A trial that raises, or returns something else than a finite number, is recorded as failed, and
    the search goes on. An interrupt (Ctrl-C) ends it; what was tried is in the storage, if there is
    one, and a second call with the same arguments goes on from there.

    When a stage after the first completes no trial, a warning tells, with the last error, and what
    the stages before have found stands: it is worth too much to be lost by an error.

    Args:
        objective: Trains with ``trial.params`` for ``trial.budget`` and returns what is to be
            minimized or maximized; may call ``trial.report`` in between.
        space: Optuna's distributions by name, for example
            ``{"lr": FloatDistribution(1e-5, 1e-1, log=True)}``.
        stages: At least one (default: 20 trials of a budget of 2, then 8 of 20).
        direction: "minimize" (default) or "maximize".
        seed: Of the sampler (default: 0).
        sampler: Makes Optuna's sampler for a seed, as ``lambda seed:
            optuna.samplers.TPESampler(seed=seed)`` does, which is the default.
        pruner: Optuna's (default: ``optuna.pruners.MedianPruner()``, which compares what is
            reported).
        storage: Where trials are kept, such as ``"sqlite:///search.db"``, or a storage of Optuna's
            (default: in memory).
        name: Of the studies in the storage, to which the stage's number is added.

    Raises:
        TypeError: An argument is of another type: something in the space is no distribution, a
            stage no :class:`Stage`.
        ValueError: There is nothing to search, no stage, or no such direction; or the storage has
            another search of that name.
        RuntimeError: No trial of the first stage could be completed; the message has the errors.
        ImportError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError("coarse_to_fine needs optuna: pip install optuna") from error
    if not callable(objective):
        raise TypeError(f"objective is no function: {shown(objective)}")
    if not isinstance(space, Mapping):
        raise TypeError(f"space is not a mapping of names to distributions: {space!r}")
    stages = items("stages", stages)
    if not space or not stages:
        raise ValueError(f"there is nothing to search: {'stages' if space else 'space'} is empty")
    for key, distribution in space.items():
        if not isinstance(distribution, optuna.distributions.BaseDistribution):
            raise TypeError(f"space[{key!r}] is no distribution of Optuna's: {distribution!r}")
    for place, stage in enumerate(stages):
        if not isinstance(stage, Stage):
            raise TypeError(f"stages[{place}] is no Stage: {stage!r}")
    if direction not in ("minimize", "maximize"):
        raise ValueError(f"direction must be 'minimize' or 'maximize': {direction!r}")
    integer("seed", seed)
    if sampler is not None and not callable(sampler):
        raise TypeError(
            "sampler is not a function that makes a sampler for a seed, such as lambda seed: "
            f"optuna.samplers.TPESampler(seed=seed): {sampler!r}"
        )
    if not isinstance(pruner, optuna.pruners.BasePruner | None):
        raise TypeError(f"pruner is no pruner of Optuna's: {pruner!r}")
    if not isinstance(storage, str | optuna.storages.BaseStorage | None):
        raise TypeError(f"storage is no address, such as 'sqlite:///search.db': {storage!r}")
    if not isinstance(name, str):
        raise TypeError(f"name is not a string: {name!r}")
    new_sampler = sampler or (lambda seed: optuna.samplers.TPESampler(seed=seed))
    # What a storage's studies must have been made for.
    asked = {
        "direction": direction,
        "space": {k: optuna.distributions.distribution_to_json(d) for k, d in space.items()},
        "stages": [asdict(stage) for stage in stages],
    }

    result = SearchResult({}, math.nan, [], [])
    spaces = dict(space)
    with _quiet(optuna):
        for place, stage in enumerate(stages):
            study = optuna.create_study(
                storage=storage,
                study_name=f"{name}-{place}",
                direction=direction,
                pruner=pruner or optuna.pruners.MedianPruner(),
                load_if_exists=True,
            )
            _check_same(study, asked, name)
            # Neither another stage nor a second call draws the same numbers again.
            study.sampler = new_sampler(seed + len(result.trials) + len(study.trials))
            if not isinstance(study.sampler, optuna.samplers.BaseSampler):
                raise TypeError(f"sampler has made no sampler of Optuna's: {study.sampler!r}")
            result.spaces.append(spaces)
            if place and all(_params(trial) != result.params for trial in _done(study)):
                study.enqueue_trial(result.params)  # the centre, with the longer budget
            _run(study, stage, place, spaces, objective)
            records = [_record(trial, place) for trial in study.trials]
            result.trials += records
            if study.get_trials(states=[optuna.trial.TrialState.COMPLETE]):
                result.params, result.value = _params(study.best_trial), study.best_value
                result.stage = place
            elif place == 0:
                errors = dict.fromkeys(found.error or found.outcome for found in records)
                raise RuntimeError(f"no trial was completed: {'; '.join(errors)}")
            else:
                ends = [found.error or found.outcome for found in records] or ["none was begun"]
                warnings.warn(
                    f"no trial of stages[{place}] was completed (the last: {ends[-1]}); params "
                    f"and value are those of stages[{result.stage}], with its budget",
                    stacklevel=2,
                )
            if place + 1 < len(stages):
                spaces = _around(study, result.params, spaces, space, stages[place + 1].shrink)
    return result


def _check_same(study: optuna.Study, asked: dict[str, Any], name: str) -> None:
    """Note what a new study is for; an old one must be for the same."""
    if not study.trials and _ASKED not in study.user_attrs:
        study.set_user_attr(_ASKED, asked)
    found = study.user_attrs.get(_ASKED, {})
    for what, wanted in asked.items():
        if found.get(what) != wanted:
            raise ValueError(
                f"the storage has a search with another {what}, of name={name!r}: choose another "
                "name, or go on with the same"
            )


def _done(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return [
        trial
        for trial in study.trials
        if trial.state.is_finished() and trial.user_attrs.get("error") != _INTERRUPTED
    ]


def _run(
    study: optuna.Study,
    stage: Stage,
    place: int,
    space: dict[str, BaseDistribution],
    objective: Callable[[Trial], float],
) -> None:
    import optuna

    def attempt(trial: optuna.Trial) -> float:
        for name, distribution in space.items():
            _suggest(trial, name, distribution)
        try:
            value = number("the objective's value", objective(Trial(trial, place, stage.budget)))
            if not math.isfinite(value):
                raise ValueError(f"the objective returned {value}")
        except optuna.TrialPruned:
            raise
        except Exception as error:
            trial.set_user_attr("error", f"{type(error).__name__}: {error}")
            raise
        except BaseException:
            trial.set_user_attr("error", _INTERRUPTED)
            raise
        return value

    left = stage.trials - len(_done(study))
    if left > 0 and not study.user_attrs.get(_OVER):
        study.optimize(attempt, n_trials=left, timeout=stage.seconds, catch=(Exception,))
    study.set_user_attr(_OVER, True)  # a second call has no more seconds for it


def _suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> None:
    import optuna

    d = distribution
    if isinstance(d, optuna.distributions.FloatDistribution):
        trial.suggest_float(name, d.low, d.high, step=d.step, log=d.log)
    elif isinstance(d, optuna.distributions.IntDistribution):
        trial.suggest_int(name, d.low, d.high, step=d.step, log=d.log)
    elif isinstance(d, optuna.distributions.CategoricalDistribution):
        trial.suggest_categorical(name, d.choices)
    else:
        raise TypeError(f"{name} has a distribution that Optuna cannot suggest from: {d!r}")


def _record(trial: optuna.trial.FrozenTrial, stage: int) -> Record:
    outcome = {"COMPLETE": "complete", "PRUNED": "pruned"}.get(trial.state.name, "failed")
    return Record(
        stage,
        _params(trial),
        trial.value if outcome == "complete" else None,
        outcome,
        trial.user_attrs.get("error"),
        trial.duration.total_seconds() if trial.duration else math.nan,
    )


def _around(
    study: optuna.Study,
    best: dict[str, Any],
    before: Mapping[str, BaseDistribution],
    whole: Mapping[str, BaseDistribution],
    shrink: float,
) -> dict[str, BaseDistribution]:
    """The same ranges, narrower, with the best in the middle, within those of the beginning."""
    import optuna

    ranks = _choices_by_value(study)
    found: dict[str, BaseDistribution] = {}
    for name, old in before.items():
        if isinstance(old, optuna.distributions.CategoricalDistribution):
            kept = max(1, math.ceil(shrink * len(old.choices)))
            order = [choice for choice in ranks.get(name, []) if choice in old.choices]
            found[name] = optuna.distributions.CategoricalDistribution(order[:kept] or old.choices)
        elif isinstance(old, optuna.distributions.FloatDistribution):
            low, high = _narrowed(best[name], old, whole[name], shrink)
            found[name] = optuna.distributions.FloatDistribution(
                low, high, log=old.log, step=old.step
            )
        elif isinstance(old, optuna.distributions.IntDistribution):
            low, high = _narrowed(best[name], old, whole[name], shrink)
            found[name] = optuna.distributions.IntDistribution(
                round(low), round(high), log=old.log, step=old.step
            )
        else:
            found[name] = old
    return found


def _narrowed(best: float, old: Any, whole: Any, shrink: float) -> tuple[float, float]:
    """The ends of a range, on its grid where it has steps."""
    if old.log:
        factor = (old.high / old.low) ** (shrink / 2)
        low, high = best / factor, best * factor
    else:
        half = (old.high - old.low) * shrink / 2
        low, high = best - half, best + half
    low, high = max(low, whole.low), min(high, whole.high)
    if old.step is not None:
        low = whole.low + old.step * math.floor((low - whole.low) / old.step + 1e-9)
        high = low + old.step * math.floor((high - low) / old.step + 1e-9)
        low, high = _rounded(low), _rounded(high)
    return low, high


def _rounded(value: float) -> float:
    """To twelve digits, because 0.4 + 3 * 0.1 ought to be 0.7, and quotients whole numbers."""
    return float(f"{value:.12g}")


def _params(trial: optuna.Trial | optuna.trial.FrozenTrial) -> dict[str, Any]:
    """What is tried; on a grid, rounded: 0.6000000000000001 would lie beyond a range up to 0.6."""
    steps = {name: getattr(each, "step", None) for name, each in trial.distributions.items()}
    return {
        name: _rounded(value) if isinstance(steps[name], float) else value
        for name, value in trial.params.items()
    }


def _choices_by_value(study: optuna.Study) -> dict[str, list[Any]]:
    """For each hyperparameter, what was chosen, from the best trial to the worst."""
    import optuna

    trials = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    sign = -1 if study.direction.name == "MAXIMIZE" else 1
    found: dict[str, list[Any]] = {}
    for trial in sorted(trials, key=lambda trial: sign * (trial.value or 0.0)):
        for name, choice in trial.params.items():
            if choice not in found.setdefault(name, []):
                found[name].append(choice)
    return found


@contextlib.contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # below, every failed trial is told
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
