"""When to end training.

:class:`EarlyStopping` works in any loop: it takes a metric and answers whether to stop. The weights
to keep are in ``best_weights.py``, whose names are to be imported from here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from fusedopt.arguments import count, finite, flag, not_negative, number, one_of, optional, shown
from fusedopt.best_weights import BestWeights, Stateful, not_a_state

__all__ = ["BestWeights", "EarlyStopping", "Progress", "Stateful", "StopReason"]


class StopReason(Enum):
    """Why to stop. ``message`` says it in a sentence."""

    NOT_STOPPED = "training goes on"
    PATIENCE = "no improvement for as many steps as patience allows"
    THRESHOLD = "stopping_threshold is reached"
    DIVERGED = "a metric is worse than divergence_threshold"
    NON_FINITE = "a metric is nan or inf"

    @property
    def message(self) -> str:
        """The reason in words."""
        return self.value


class Progress(NamedTuple):
    """How far one metric has come.

    Attributes:
        best_value: The best value so far; None before there is one.
        best_step: The step that had it, counted from 0; None before there is one.
        num_bad: Steps in a row that were no progress.
    """

    best_value: float | None = None
    best_step: int | None = None
    num_bad: int = 0


@dataclass(frozen=True)
class _Rule:
    """What is good and bad for one metric."""

    mode: str
    min_delta: float
    relative: bool
    baseline: float | None
    stopping_threshold: float | None
    divergence_threshold: float | None

    def gain(self, value: float, over: float) -> float:
        return over - value if self.mode == "min" else value - over

    def better(self, value: float, than: float) -> bool:
        # A factor on ``than`` itself would ask for a worse value where that is negative.
        margin = self.min_delta * abs(than) if self.relative else self.min_delta
        return math.isfinite(value) and self.gain(value, than) > margin

    def reached(self, value: float) -> bool:
        goal = self.stopping_threshold
        return goal is not None and math.isfinite(value) and self.gain(value, goal) >= 0

    def diverged(self, value: float) -> bool:
        limit = self.divergence_threshold
        return limit is not None and self.gain(value, limit) < 0

    def judge(self, value: float, before: Progress, step: int) -> Progress:
        best = before.best_value
        improved = math.isfinite(value) if best is None else self.better(value, best)
        if not improved:
            return before._replace(num_bad=before.num_bad + 1)
        progress = self.baseline is None or self.better(value, self.baseline)
        return Progress(value, step, 0 if progress else before.num_bad + 1)


class _State(NamedTuple):
    """All that a step changes."""

    steps: int
    metrics: tuple[Progress, ...]
    improved: bool
    reason: StopReason

    def pack(self) -> list[float]:
        """As numbers, for other ranks."""
        numbers: list[float] = [self.steps, self.improved, list(StopReason).index(self.reason)]
        for value, step, num_bad in self.metrics:
            numbers += [
                math.nan if value is None else value,
                -1 if step is None else step,
                num_bad,
            ]
        return numbers

    @staticmethod
    def unpack(numbers: list[float]) -> _State:
        steps, improved, reason, *rest = numbers
        metrics = [
            Progress(None, None, int(num_bad))
            if step < 0
            else Progress(value, int(step), int(num_bad))
            for value, step, num_bad in zip(rest[::3], rest[1::3], rest[2::3], strict=True)
        ]
        return _State(int(steps), tuple(metrics), bool(improved), list(StopReason)[int(reason)])


class EarlyStopping:
    """Tells when a metric no longer improves.

    Call :meth:`step` after each evaluation. A value is an improvement when it is better than the
    best so far by more than ``min_delta``; the first finite value always is. nan and inf never
    become the best.

    A step looks, in this order, for: a nan or inf (``check_finite``); a value beyond
    ``divergence_threshold``; an improvement, which becomes the best and is saved; a value that
    reaches ``stopping_threshold``; the end of ``patience``. The first two end the step: what
    they find changes no best value.

    With ``torch.distributed`` initialized, every rank of the group has to call :meth:`step`. The
    values are averaged over the ranks, the first rank decides, and all take over its decision.

    Patience is that of I. Goodfellow, Y. Bengio and A. Courville, "Deep Learning", 2016,
    algorithm 7.1.

    Args:
        monitor: The metric's name, or ``{name: mode}`` for several, of which the first decides
            what the best weights are.
        mode: ``"min"`` (default) when lower is better, ``"max"`` when higher is. Only with a
            single name.
        patience: Stop at that many steps in a row without an improvement. 0 is the same as 1.
        min_delta: How much better an improvement has to be; not negative. A number, or
            ``{name: number}``.
        min_delta_mode: ``"abs"``: in the metric's units; ``"rel"``: in units of ``abs(best)``.
        baseline: Improvements that are not better than this do not end the count of bad steps;
            they are still the best so far. This and the two thresholds are numbers, or
            ``{name: number}`` for any of several metrics.
        start_from: So many first steps are only checked for nan and inf.
        stopping_threshold: Stop when the metric is as good as this or better.
        divergence_threshold: Stop when the metric is worse than this.
        check_finite: Stop at a nan or inf (default). Else they count as bad steps.
        require: With several metrics, whether ``"all"`` (default) have to run out of patience, or
            to reach those thresholds that there are; or ``"any"``.
        best: Where to save at each improvement.
        process_group: Whose ranks decide together; None: all, once ``torch.distributed`` is
            initialized.

    Example::

        with BestWeights({"model": model}) as best:
            stopper = EarlyStopping("val_loss", patience=5, best=best)
            for epoch in range(100):
                train_epoch()
                if stopper.step(evaluate()):
                    break
        # the model is the best one now
    """

    def __init__(
        self,
        monitor: str | Mapping[str, str] = "val_loss",
        *,
        mode: str | None = None,
        patience: int = 10,
        min_delta: float | Mapping[str, float] = 0.0,
        min_delta_mode: str = "abs",
        baseline: float | Mapping[str, float] | None = None,
        start_from: int = 0,
        stopping_threshold: float | Mapping[str, float] | None = None,
        divergence_threshold: float | Mapping[str, float] | None = None,
        check_finite: bool = True,
        require: str = "all",
        best: BestWeights | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        modes = _modes(monitor, mode)
        self._patience = count("patience", patience)
        self._start_from = count("start_from", start_from)
        self._check_finite = flag("check_finite", check_finite)
        self._combine = {"all": all, "any": any}[one_of("all", "any")("require", require)]
        relative = one_of("abs", "rel")("min_delta_mode", min_delta_mode) == "rel"
        if not isinstance(min_delta, Mapping):
            min_delta = dict.fromkeys(modes, min_delta)
        deltas = {n: not_negative("min_delta", d) for n, d in _named("min_delta", min_delta, modes)}
        baselines = _limits("baseline", baseline, modes)
        goals = _limits("stopping_threshold", stopping_threshold, modes)
        limits = _limits("divergence_threshold", divergence_threshold, modes)
        self._rules = {
            name: _Rule(
                m,
                deltas.get(name, 0.0),
                relative,
                baselines.get(name),
                goals.get(name),
                limits.get(name),
            )
            for name, m in modes.items()
        }
        for name in goals.keys() & limits.keys():
            if self._rules[name].diverged(goals[name]):
                raise ValueError(
                    f"stopping_threshold={goals[name]} of {name!r} is worse than "
                    f"divergence_threshold={limits[name]}"
                )
        if not isinstance(best, BestWeights | None):
            raise TypeError(f"best is not a BestWeights: {shown(best)}")
        self._best = best
        if process_group is not None and (
            not dist.is_available() or not isinstance(process_group, dist.ProcessGroup)
        ):
            raise TypeError(f"process_group is not a group that has this rank: {process_group!r}")
        self._process_group = process_group
        self._state = _State(0, (Progress(),) * len(modes), False, StopReason.NOT_STOPPED)

    def step(self, metrics: float | Tensor | Mapping[str, Any]) -> bool:
        """Judge the metrics of an evaluation.

        When it raises, nothing has changed. After a stop it may be called again, and judges anew.

        Args:
            metrics: A number or a tensor of one element; or a mapping that has the monitored
                names, and any others.

        Returns:
            True to stop: :attr:`should_stop`, on every rank the same.

        Raises:
            KeyError: A monitored metric is missing.
            TypeError: A metric is not a number.
            ValueError: A metric is a tensor with another number of elements than one, or an
                integer too large for a float.
            RuntimeError: One of these on another rank.
        """
        if dist.is_available() and dist.is_initialized():
            state = self._decide_together(metrics)
        else:
            state = self._decide(self._read(metrics))
        if state.improved and self._best is not None:
            self._best.save(state.steps - 1)
        self._state = state
        return self.should_stop

    def _read(self, metrics: float | Tensor | Mapping[str, Any]) -> list[float]:
        if not isinstance(metrics, Mapping):
            if len(self._rules) > 1:
                raise TypeError(f"metrics is no mapping with {list(self._rules)}: {shown(metrics)}")
            return [_metric(name, metrics) for name in self._rules]
        for name in self._rules:
            if name not in metrics:
                raise KeyError(f"no metric {name!r}; there are {list(metrics)}")
        return [_metric(name, metrics[name]) for name in self._rules]

    def _decide(self, values: list[float]) -> _State:
        step, rules = self._state.steps, self._rules.values()
        quiet = self._state._replace(steps=step + 1, improved=False, reason=StopReason.NOT_STOPPED)
        if self._check_finite and not all(map(math.isfinite, values)):
            return quiet._replace(reason=StopReason.NON_FINITE)
        if step < self._start_from:
            return quiet
        if any(rule.diverged(value) for rule, value in zip(rules, values, strict=True)):
            return quiet._replace(reason=StopReason.DIVERGED)
        judged = zip(rules, values, self._state.metrics, strict=True)
        metrics = tuple(rule.judge(value, before, step) for rule, value, before in judged)
        reached = [
            rule.reached(value)
            for rule, value in zip(rules, values, strict=True)
            if rule.stopping_threshold is not None
        ]
        if reached and self._combine(reached):
            reason = StopReason.THRESHOLD
        elif self._out_of_patience(metrics):
            reason = StopReason.PATIENCE
        else:
            reason = StopReason.NOT_STOPPED
        return _State(step + 1, metrics, metrics[0].best_step == step, reason)

    def _out_of_patience(self, metrics: tuple[Progress, ...]) -> bool:
        return self._combine([m.num_bad >= max(self._patience, 1) for m in metrics])

    def _decide_together(self, metrics: float | Tensor | Mapping[str, Any]) -> _State:
        group = self._process_group
        # A rank that raised before it communicates would leave the others waiting for it.
        error: Exception | None = None
        try:
            values = self._read(metrics)
        except Exception as caught:
            values, error = [0.0] * len(self._rules), caught
        backends = dist.get_backend_config(group)  # such as "cpu:gloo,cuda:nccl"
        place = "cpu" if "cpu:" in backends else backends.partition(":")[0]
        total = torch.tensor([*values, error is not None], dtype=torch.float64, device=place)
        dist.all_reduce(total, group=group)
        *sums, errors = total.tolist()
        if error is not None:
            raise error
        if errors:
            raise RuntimeError(f"step() was given bad metrics on {int(errors)} other rank(s)")
        size = dist.get_world_size(group)
        state = self._decide([value / size for value in sums])
        # Ranks may hold different states, from different checkpoints: the first one's counts.
        packed = torch.tensor(state.pack(), dtype=torch.float64, device=place)
        dist.broadcast(packed, group=group, group_src=0)
        return _State.unpack(packed.tolist())

    @property
    def should_stop(self) -> bool:
        """What the last :meth:`step` returned."""
        return self._state.reason is not StopReason.NOT_STOPPED

    @property
    def reason(self) -> StopReason:
        """Why the last step said to stop, if it did."""
        return self._state.reason

    @property
    def steps(self) -> int:
        """How often :meth:`step` was called: the number of the next step."""
        return self._state.steps

    @property
    def improved(self) -> bool:
        """Whether the last step was an improvement of the (first) metric."""
        return self._state.improved

    @property
    def best_value(self) -> float | None:
        """The best value of the (first) metric; None before there is one."""
        return self._state.metrics[0].best_value

    @property
    def best_step(self) -> int | None:
        """The step that had it, counted from 0; None before there is one."""
        return self._state.metrics[0].best_step

    @property
    def num_bad(self) -> int:
        """Steps in a row that were no progress of the (first) metric."""
        return self._state.metrics[0].num_bad

    @property
    def progress(self) -> dict[str, Progress]:
        """The same for each metric."""
        return dict(zip(self._rules, self._state.metrics, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What the steps found, in plain numbers and strings; none of the constructor's options."""
        return {
            "steps": self.steps,
            "improved": self.improved,
            "reason": self.reason.name,
            "metrics": {
                name: {"mode": self._rules[name].mode, **progress._asdict()}
                for name, progress in self.progress.items()
            },
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another one was. Patience and all other options stay the constructor's.

        A stop for lack of patience is judged again, by this one's patience.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: It is of other metrics, of another mode, or not an EarlyStopping's at all.
        """
        own = {name: rule.mode for name, rule in self._rules.items()}
        try:
            loaded = state_dict["metrics"]
            found = {name: entry["mode"] for name, entry in loaded.items()}
            metrics = tuple(_progress(loaded[name]) for name in own if name in loaded)
            reason = StopReason[state_dict["reason"]]
            steps = count("steps", state_dict["steps"])
            improved = flag("improved", state_dict["improved"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise not_a_state(state_dict, "EarlyStopping", error) from error
        if found != own:
            raise ValueError(f"state_dict is of the metrics {found}, not {own}")
        if reason is StopReason.PATIENCE and not self._out_of_patience(metrics):
            reason = StopReason.NOT_STOPPED
        self._state = _State(steps, metrics, improved, reason)


def _modes(monitor: Any, mode: Any) -> dict[str, str]:
    check = one_of("min", "max")
    if isinstance(monitor, str):
        return {monitor: check("mode", "min" if mode is None else mode)}
    if not isinstance(monitor, Mapping):
        raise TypeError(
            f"monitor is neither a name nor a mapping of names to modes: {shown(monitor)}"
        )
    if not monitor:
        raise ValueError(f"monitor has no metric: {monitor!r}")
    if mode is not None:
        raise ValueError(f"mode={mode!r}: monitor has the modes already: {monitor!r}")
    for name in monitor:
        if not isinstance(name, str):
            raise TypeError(f"monitor has a name that is no string: {name!r}")
    return {name: check(f"monitor[{name!r}]", value) for name, value in monitor.items()}


def _named(name: str, values: Mapping[str, Any], known: Mapping[str, str]) -> Iterator[Any]:
    for metric in values:
        if metric not in known:
            raise ValueError(f"{name} has {metric!r}, which is not among {list(known)}")
    yield from values.items()


def _limits(name: str, value: Any, known: Mapping[str, str]) -> dict[str, float]:
    """A finite number for each metric that has one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        if len(known) > 1:
            raise ValueError(f"{name} must say of which metric it is, as {{name: {value!r}}}")
        value = dict.fromkeys(known, value)
    return {metric: finite(name, limit) for metric, limit in _named(name, value, known)}


def _progress(entry: Mapping[str, Any]) -> Progress:
    """A metric's part of a state dict, checked."""
    value, step, num_bad = (entry[field] for field in Progress._fields)
    if (value is None) != (step is None):
        raise ValueError(f"best_value and best_step belong together: {value!r} and {step!r}")
    value, step = optional(finite)("best_value", value), optional(count)("best_step", step)
    return Progress(value, step, count("num_bad", num_bad))


def _metric(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"metric {name!r} has {value.numel()} elements, not one")
    return number(f"metric {name!r}", value)
