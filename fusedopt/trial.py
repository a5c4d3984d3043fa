"""Training steps that leave no trace: what the learning-rate range test and the checks share."""

from __future__ import annotations

import copy
import math
import random
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusedopt.arguments import shown
from fusedopt.optimizer import FusedOptimizer
from fusedopt.swapping import Block, Loan


def _overwrite(content: Loan, grad: Tensor | None) -> None:
    with torch.inference_mode(False), torch.no_grad():
        content.restore()
    if content.tensor.is_leaf:
        content.tensor.grad = grad


def _refill_dict(target: dict[Any, Any], content: dict[Any, Any]) -> None:
    target.clear()
    target.update(content)


def _refill_list(target: list[Any], content: list[Any]) -> None:
    target[:] = content


def _refill_set(target: set[Any], content: set[Any]) -> None:
    target.clear()
    target.update(content)


def _refill_deque(target: deque[Any], content: list[Any]) -> None:
    target.clear()
    target.extend(content)


def _refill_array(target: Any, content: Any) -> None:
    if target.shape != content.shape:  # or the assignment would broadcast
        target.resize(content.shape)
    target[...] = content


def _is_array(value: Any) -> bool:
    """Whether it is a NumPy array that can be written to."""
    numpy = sys.modules.get("numpy")  # there are no arrays before someone imports it
    return numpy is not None and isinstance(value, numpy.ndarray) and value.flags.writeable


def _do_all(calls: Sequence[Callable[[], Any]]) -> None:
    """Call each in this order, also after one that raises; its error goes on at the end."""
    with ExitStack() as stack:
        for call in reversed(calls):  # the stack begins with the last
            stack.callback(call)


class _Snapshot:
    """Remembers what objects hold and puts it back into the very same objects.

    It follows dicts, lists, tuples, sets, deques, modules and optimizers. Of tensors and arrays it
    makes copies, so nothing that is written later reaches them; gradients are set aside and not
    copied, because :meth:`set_gradients_aside` has backward make new ones. All else is kept by
    reference.
    """

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}  # objects by id; being held, they keep their id
        self._undo: list[Callable[[], None]] = []
        self._leaves: list[Tensor] = []

    def keep(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        inside: list[Any] = []
        if isinstance(value, Tensor):
            grad = value.grad if value.is_leaf else None
            content = Loan("", value)
            content.keep()
            self._undo.append(partial(_overwrite, content, grad))
            if grad is not None:
                self._leaves.append(value)
        elif isinstance(value, dict):
            self._undo.append(partial(_refill_dict, value, dict(value)))
            inside = [*value.keys(), *value.values()]
        elif isinstance(value, list):
            self._undo.append(partial(_refill_list, value, list(value)))
            inside = value
        elif isinstance(value, set):
            self._undo.append(partial(_refill_set, value, set(value)))
            inside = list(value)
        elif isinstance(value, deque):
            self._undo.append(partial(_refill_deque, value, list(value)))
            inside = list(value)
        elif _is_array(value):
            self._undo.append(partial(_refill_array, value, value.copy()))
            inside = value.ravel().tolist() if value.dtype.hasobject else []
        elif isinstance(value, tuple):
            inside = list(value)
        elif isinstance(value, torch.nn.Module):
            # Scripted modules do not have their tensors in __dict__.
            inside = [vars(value), *value.parameters(), *value.buffers()]
        elif isinstance(value, torch.optim.Optimizer):
            inside = [vars(value)]
        for each in inside:
            self.keep(each)

    def set_gradients_aside(self) -> None:
        for leaf in self._leaves:
            leaf.grad = None

    def restore(self) -> None:
        _do_all(self._undo)


def _keep_rng() -> Callable[[], None]:
    """A function that sets all random number generators back to where they are now."""
    undo: list[Callable[[], Any]] = [
        partial(random.setstate, random.getstate()),
        partial(torch.set_rng_state, torch.get_rng_state()),
    ]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        undo.append(partial(numpy.random.set_state, numpy.random.get_state()))
    if torch.cuda.is_initialized():
        undo.append(partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    return partial(_do_all, undo)


def _keep_other(value: Any) -> Callable[[], Any]:
    """A function that gives its state back to an object that is not a module."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    return partial(value.load_state_dict, copy.deepcopy(value.state_dict()))


def check_arguments(
    optimizer: torch.optim.Optimizer, stateful: Sequence[Any], scaler: Any = None
) -> None:
    """What :func:`trial` refuses, told before anything is looked at more closely."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is not a torch.optim.Optimizer: {shown(optimizer)}")
    if not isinstance(stateful, (tuple, list)):
        raise TypeError(
            f"stateful is not a tuple or list, as (model,) would be: {type(stateful).__name__}"
        )
    for index, value in enumerate(stateful):
        known = isinstance(value, torch.Generator) or (
            hasattr(value, "state_dict") and hasattr(value, "load_state_dict")
        )
        if not known:
            raise TypeError(
                f"stateful[{index}] has no state_dict() and load_state_dict(), and is no "
                f"torch.Generator: {type(value).__name__}"
            )
    if scaler is not None and not all(hasattr(scaler, n) for n in ("scale", "step", "update")):
        raise TypeError(f"scaler is not a GradScaler: {shown(scaler)}")
    params = {p for group in optimizer.param_groups for p in group["params"]}
    states = [state for p, state in optimizer.state.items() if p in params]
    if any(isinstance(state, dict) and int(state.get("grad_count", 0)) for state in states):
        raise RuntimeError(
            "accumulate() has gradients that no step() has used: step() or zero_grad() first"
        )


class _Trial(Block):
    """What :func:`trial` returns."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, stateful: Sequence[Any], scaler: Any
    ) -> None:
        self._optimizer, self._stateful, self._scaler = optimizer, stateful, scaler
        self._undo: list[Callable[[], Any]] = []

    def _enter(self) -> None:
        optimizer = self._optimizer
        snapshot = _Snapshot()
        # check_arguments() has asked for the state: a fused optimizer trusts nothing that it knew.
        snapshot.keep(optimizer)
        if isinstance(optimizer, FusedOptimizer):
            # The norm and the count of skipped steps on devices.
            snapshot.keep(optimizer._reports())
        modules = [each for each in self._stateful if isinstance(each, torch.nn.Module)]
        snapshot.keep(modules)
        if self._scaler is not None:
            snapshot.keep(vars(self._scaler))
        others = [each for each in self._stateful if not isinstance(each, torch.nn.Module)]
        self._undo = [
            *map(_keep_other, others),  # first, because a scheduler may write into the groups
            *([optimizer._forget_state] if isinstance(optimizer, FusedOptimizer) else []),
            snapshot.restore,
            _keep_rng(),
        ]
        self._entered = True
        snapshot.set_gradients_aside()

    def _leave(self) -> None:
        if self._entered:
            try:
                _do_all(self._undo)
            except Exception:  # of what cannot be restored; all else has been
                self._entered = False
                raise
            self._entered = False


def trial(
    optimizer: torch.optim.Optimizer, stateful: Sequence[Any], scaler: Any = None
) -> AbstractContextManager[None]:
    """Within the block one may train; after it, everything is as it was, bit for bit.

    However the block ends; when something cannot be restored, all else is, and then that error
    goes on. Back are: parameters, gradients, buffers (also those that are not persistent), other
    attributes and the mode of all modules; state, groups and other attributes of the optimizer, a
    learning rate in a tensor included; the scaler; Python's, NumPy's and torch's generators on the
    CPU and on CUDA (where in use before). Tensors stay the same objects and keep their memory. It
    takes a copy of all these tensors where they are.

    Of attributes, dicts, lists, tuples, sets, deques, tensors and NumPy arrays get back what is in
    them. Any other object is the same one again, but what the block has changed inside it (in one
    of a class of your own, a bytearray, a ``random.Random``) stays changed.

    Args:
        optimizer: Any. Its parameters count as given, in ``stateful`` or not.
        stateful: Modules, generators, and other objects with ``state_dict`` and
            ``load_state_dict``.
        scaler: A ``torch.amp.GradScaler``, or None.

    Raises:
        TypeError: An argument is of another kind.
        RuntimeError: The optimizer has a window of ``accumulate()`` open.
    """
    check_arguments(optimizer, stateful, scaler)
    return _Trial(optimizer, stateful, scaler)


def train_step(
    closure: Callable[[Any], Tensor],
    batches: Sequence[Any],
    optimizer: torch.optim.Optimizer,
    scaler: Any = None,
) -> float:
    """One step along the mean of the batches' gradients. Returns the mean loss before it.

    A loss that is not finite is returned at once: there is no step then.
    """
    optimizer.zero_grad()
    total = 0.0
    for batch in batches:
        loss = closure(batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(
                f"closure(batch) must return a loss, a tensor of one number: {shown(loss)}"
            )
        if not loss.requires_grad:
            raise ValueError("closure(batch) must return a loss that backward() can start from")
        value = float(loss.detach())
        if not math.isfinite(value):
            return value
        total += value / len(batches)
        share = loss / len(batches)
        (share if scaler is None else scaler.scale(share)).backward()
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    return total
