"""Steps have names in profilers, and the timer tells the optimizer's share."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from helpers import DEVICE, every_class, make_params, params_of, set_grads

import fusedopt
from fusedopt import profiling
from fusedopt.profiling import StepTimer


def names(run: Any) -> list[str]:
    with torch.autograd.profiler.profile() as profile:
        run()
    return [event.name for event in profile.function_events]


@every_class
def test_phases_have_names(case: Any) -> None:
    optimizer = case.ours(make_params(), max_grad_norm=1.0)
    set_grads(params_of(optimizer), 0)
    assert "fusedopt: accumulate" in names(optimizer.accumulate)
    set_grads(params_of(optimizer), 1)
    found = names(optimizer.step)
    stock = f"Optimizer.step#{case.name}.step"
    wanted = [stock, "fusedopt: look", "fusedopt: norm", "fusedopt: update"]
    assert [name for name in found if name in wanted] == wanted
    optimizer.max_grad_norm = None
    set_grads(params_of(optimizer), 2)
    assert "fusedopt: norm" not in names(optimizer.step)


def test_what_is_left_to_torch_has_a_name() -> None:
    if DEVICE.type == "fake":
        pytest.skip("no sparse tensors on the emulated GPU")
    param = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = fusedopt.SGD([param], lr=0.1)
    param.grad = torch.ones_like(param).to_sparse()
    with pytest.warns(UserWarning, match="leaves 1 parameter"):
        found = names(optimizer.step)
    assert "fusedopt: leave to torch" in found


def test_without_a_profiler_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("a range without a profiler")

    monkeypatch.setattr(profiling.profiler, "record_function", fail)
    assert profiling.phase("anything") is profiling.phase("something else")


class Clock:
    """What ``time.perf_counter`` tells while it is in its place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


class SlowSGD(torch.optim.SGD):
    """Takes a quarter of a second, unless it fails."""

    clock: Clock
    fails = False

    def step(self, closure: Any = None) -> None:
        self.clock.now += 0.25
        if self.fails:
            raise ZeroDivisionError


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SlowSGD:
    optimizer = SlowSGD([torch.nn.Parameter(torch.ones(3, device="cpu"))], lr=0.1)
    optimizer.clock = Clock(monkeypatch)
    return optimizer


def test_share(slow: SlowSGD) -> None:
    timer = StepTimer(slow)
    assert str(timer) == "SlowSGD: no steps timed yet"
    for forward in (5.0, 0.5, 1.0):  # of which the first does not count
        slow.clock.now += forward
        with timer.timing():
            slow.clock.now += 0.125
        slow.clock.now += 0.125
        slow.step()
    assert timer.steps == 2
    assert timer.step_seconds == 0.375
    assert timer.iteration_seconds == 1.25
    assert timer.share == 0.3
    assert timer.device_step_seconds is None
    assert str(timer) == "SlowSGD: 375.000 ms of 1250.000 ms per iteration, 30.0%, over 2 steps"


def test_a_block_after_the_last_step_is_of_the_next_one(slow: SlowSGD) -> None:
    timer = StepTimer(slow)
    for _ in range(3):
        slow.clock.now += 0.25
        slow.step()
        assert timer.steps == 0 or timer.share == 0.75
        with timer.timing():
            slow.clock.now += 0.5
    assert timer.steps == 2
    assert timer.iteration_seconds == 1.0
    assert timer.share == 0.75


@pytest.mark.parametrize("wrong", ["x", torch.nn.Linear(2, 2, device="cpu"), None])
def test_only_optimizers_are_timed(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"^optimizer must be a torch\.optim\.Optimizer: "):
        StepTimer(wrong)


def test_repr(slow: SlowSGD) -> None:
    timer = StepTimer(slow)
    assert repr(timer) == "<StepTimer of SlowSGD: 0 steps>"


def test_reset_and_close(slow: SlowSGD) -> None:
    with StepTimer(slow) as timer:
        for _ in range(3):
            slow.step()
        assert timer.share == 1.0
        timer.reset()
        assert timer.steps == 0
        assert timer.share != timer.share
        slow.step()
        slow.clock.now += 0.25
        slow.step()
        assert timer.share == 0.5
    slow.step()
    assert timer.steps == 1


def test_a_step_that_raises_is_not_counted(slow: SlowSGD) -> None:
    timer = StepTimer(slow)
    slow.step()
    slow.fails = True
    with pytest.raises(ZeroDivisionError):
        slow.step()
    slow.fails = False
    slow.step()
    assert timer.steps == 1
    assert timer.step_seconds == 0.25


@every_class
def test_real_steps(case: Any) -> None:
    params = make_params()
    optimizer = case.ours(params)
    timer = StepTimer(optimizer)
    for step in range(4):
        set_grads(params, step)
        optimizer.step()
    assert timer.steps == 3
    assert 0 < timer.share < 1
    assert 0 < timer.step_seconds < timer.iteration_seconds or DEVICE.type != "cpu"
    assert (timer.device_step_seconds is None) == (DEVICE.type == "cpu")
