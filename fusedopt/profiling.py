"""Where the time of a step goes: names for profilers, and a timer for training loops."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.autograd import profiler

_NOTHING: AbstractContextManager[Any] = nullcontext()


def phase(name: str) -> AbstractContextManager[Any]:
    """The block, by name in ``torch.profiler``; as an NVTX range under ``emit_nvtx()``.

    Without a profiler there is nothing but a look at whether there is one.
    """
    return profiler.record_function(name) if profiler._is_profiler_enabled else _NOTHING


class StepTimer:
    """Measures the share of a training loop's time that is spent in an optimizer.

    Any ``torch.optim.Optimizer``: its ``step()`` is timed by hooks. What else belongs to the update
    (clipping, ``accumulate()``, an average of the weights) is timed when it is done within
    :meth:`timing`. On an accelerator there are two times: that of the host, until the calls
    return, and that of the device, by events, which nobody waits for until one asks.

    An iteration is what lies between the ends of two steps. The first step only starts the clock:
    it creates the optimizer's state. A block after a step belongs to the next one's iteration.
    ``step(closure)`` counts as a whole, with the forward and backward passes of the closure.

    Args:
        optimizer: Whose steps to time. :meth:`close` lets go of it.

    Raises:
        TypeError: It is no ``torch.optim.Optimizer``.

    Example::

        timer = StepTimer(optimizer)
        for batch in loader:
            ...
            with timer.timing():
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        print(timer)
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer: {optimizer!r}")
        params = [p for group in optimizer.param_groups for p in group["params"]]
        types = {p.device.type for p in params} - {"cpu", "meta"}
        self._event_type = torch.get_device_module(types.pop()).Event if types else None
        self._begun: float | None = None
        self._begun_event: Any = None
        # What began and ended, first in the iteration that goes on, then in those that are over.
        self._pending: list[tuple[Any, Any]] = []
        self._pairs: deque[tuple[Any, Any]] = deque()
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._begin()),
            optimizer.register_step_post_hook(lambda *_: self._end_step()),
        ]
        self._name = type(optimizer).__name__
        self.reset()

    def reset(self) -> None:
        """Forget what was measured; the next step starts the clock."""
        self.steps = 0
        self._host = self._host_pending = self._device = 0.0
        self._pending.clear()
        self._pairs.clear()
        self._first: float | None = None
        self._last = 0.0
        self._first_event: Any = None
        self._last_event: Any = None

    def close(self) -> None:
        """Time no more steps. What was measured stays."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> StepTimer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def timing(self) -> Iterator[None]:
        """The block counts as the optimizer's. Not around ``step()``, which does so anyway."""
        self._begin()
        try:
            yield
        finally:
            self._end()

    def _event(self) -> Any:
        if self._event_type is None:
            return None
        event = self._event_type(enable_timing=True)
        event.record()
        return event

    def _begin(self) -> None:
        self._begun_event = self._event()
        self._begun = time.perf_counter()

    def _end(self) -> float:
        end = time.perf_counter()
        if self._begun is not None:
            self._host_pending += end - self._begun
            self._begun = None
            if self._event_type is not None:
                self._pending.append((self._begun_event, self._event()))
        return end

    def _add(self, begin: Any, end: Any) -> None:
        self._device += begin.elapsed_time(end) / 1e3

    def _end_step(self) -> None:
        self._last = self._end()
        self._last_event = self._pending[-1][1] if self._pending else self._event()
        if self._first is None:
            self._first, self._first_event = self._last, self._last_event
        else:
            self.steps += 1
            self._host += self._host_pending
            self._pairs.extend(self._pending)
            while self._pairs and self._pairs[0][1].query():  # done already: keep few of them
                self._add(*self._pairs.popleft())
        self._host_pending = 0.0
        self._pending.clear()

    def _settle(self) -> None:
        """Wait for the device, as far as it has something to tell."""
        while self._pairs:
            begin, end = self._pairs.popleft()
            end.synchronize()
            self._add(begin, end)

    @property
    def step_seconds(self) -> float:
        """Seconds of the host for an iteration's update, in the mean; nan without any."""
        return self._host / self.steps if self.steps else float("nan")

    @property
    def device_step_seconds(self) -> float | None:
        """As :attr:`step_seconds`, of the device; None on the CPU. Waits for the device."""
        if self._event_type is None:
            return None
        self._settle()
        return self._device / self.steps if self.steps else float("nan")

    @property
    def iteration_seconds(self) -> float:
        """Seconds for an iteration, in the mean; nan without any. Waits for the device."""
        if self._first is None or not self.steps:
            return float("nan")
        if self._event_type is None:
            return (self._last - self._first) / self.steps
        self._last_event.synchronize()
        return float(self._first_event.elapsed_time(self._last_event)) / 1e3 / self.steps

    @property
    def share(self) -> float:
        """The part of an iteration's time that is the update's, on the device where there is one.

        Between 0 and 1; nan before the second step. Waits for the device.
        """
        device = self.device_step_seconds
        return (self.step_seconds if device is None else device) / self.iteration_seconds

    def __repr__(self) -> str:
        """Unlike ``str()``, waits for nothing."""
        return f"<StepTimer of {self._name}: {self.steps} steps>"

    def __str__(self) -> str:
        """One line."""
        if not self.steps:
            return f"{self._name}: no steps timed yet"
        device = self.device_step_seconds
        on_device = "" if device is None else f" ({1e3 * device:.3f} ms on the device)"
        return (
            f"{self._name}: {1e3 * self.step_seconds:.3f} ms{on_device} of "
            f"{1e3 * self.iteration_seconds:.3f} ms per iteration, {self.share:.1%}, "
            f"over {self.steps} steps"
        )
