"""The weights to keep: a store for the best state of models, optimizers, and what else has one."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fusedopt.arguments import count, shown
from fusedopt.swapping import complete, memory_of

# Where a tensor is in a state dict: the keys and indices that lead to it.
_Path = tuple[Any, ...]


class Stateful(Protocol):
    """A model, an optimizer, or anything else with a state dict."""

    def state_dict(self) -> Any:
        """What :meth:`load_state_dict` needs to bring the object back to what it is now."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Bring the object back."""


class BestWeights:
    """Keeps a copy of models, optimizers, and whatever else has a state dict.

    The first :meth:`save` allocates the memory, the others reuse it. As a context manager it
    restores at the end of the block however that ends; an exception (also Ctrl-C) goes on after
    that. When nothing was saved, all stays as it is, and a normal end is a RuntimeError.

    Args:
        stateful: Names and objects, such as ``{"model": model, "optimizer": optimizer}``.
        storage: ``"cpu"`` (default): in the host's memory, pinned for what comes from a CUDA
            device; ``"device"``: each tensor's copy beside it; a ``pathlib.Path``: in that file,
            which is replaced at once when the new one is complete. Each process needs a file of
            its own.

    Attributes:
        step: The step that is kept; None before :meth:`save`.
    """

    def __init__(self, stateful: Mapping[str, Stateful], *, storage: str | Path = "cpu") -> None:
        if not isinstance(stateful, Mapping):
            raise TypeError(f"stateful is not a mapping of names to objects: {shown(stateful)}")
        if not stateful:
            raise ValueError(f"stateful has no object: {stateful!r}")
        for name, item in stateful.items():
            if not isinstance(name, str):
                raise TypeError(f"stateful has a name that is no string: {name!r}")
            for method in ("state_dict", "load_state_dict"):
                if not callable(getattr(item, method, None)):
                    raise TypeError(f"stateful[{name!r}] has no method {method}: {shown(item)}")
        if isinstance(storage, Path):
            if storage.is_dir() or not storage.parent.is_dir():
                raise ValueError(f"storage must be a file in an existing folder: {storage!r}")
        elif storage not in ("cpu", "device"):
            raise ValueError(f"storage must be 'cpu', 'device' or a pathlib.Path: {storage!r}")
        self._stateful = dict(stateful)
        self._storage = storage
        self._kept: dict[str, Any] = {}
        self._buffers: dict[_Path, Tensor] = {}
        self.step: int | None = None

    def save(self, step: int) -> None:
        """Keep everything as it is now, in place of what was kept.

        Args:
            step: What :meth:`restore` shall return.

        Raises:
            TypeError: A state dict holds what a file cannot, and storage is a file; what was
                kept before still is.
            RuntimeError: Within the ``swap_ema()`` of an optimizer that is among the objects, or
                the ``swap()`` of an average: the model has the average there.
        """
        count("step", step)
        self._check_not_swapped("save")
        # Not the caller's mode: memory from inference_mode() could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._keep({name: item.state_dict() for name, item in self._stateful.items()}, step)

    def restore(self) -> int:
        """Bring everything back to what was kept.

        All that can be is compared before anything is written: a model's entries, their shapes and
        dtypes; an optimizer's groups, and the shapes of its state. (State that has been added since
        is dropped, and what is missing is made again.) Other objects check for themselves. All are
        restored, also after one that raises; an interrupt (Ctrl-C) goes on when all are.

        Returns:
            The step that was given to :meth:`save`.

        Raises:
            RuntimeError: Nothing was saved, or the file is of another step now. Or as for
                :meth:`save`. Or an object could not be restored; the message names it, and the
                others have been.
            ValueError: An entry is not what it was; the message names it, and nothing was restored.
                Or the file holds something else altogether.
        """
        if self.step is None:
            raise RuntimeError(
                "there is nothing to restore: nothing was saved. Usual reasons: no metric was ever "
                "an improvement, as each was nan, inf or beyond divergence_threshold (the reason "
                "of the EarlyStopping says so); the run was not longer than start_from; or the "
                "EarlyStopping was not given best="
            )
        self._check_not_swapped("restore")
        failures: dict[str, Exception] = {}
        with torch.inference_mode(False), torch.no_grad():
            if isinstance(self._storage, Path):
                kept = self._load()
                self._check_names(kept, str(self._storage))
            else:
                kept = self._kept
            places = dict(_tensors(self._present(kept)))
            copies: dict[int, Tensor] = {}
            written: set[Any] = set()
            targets, sources = [], []
            for path, source in _tensors(kept):
                if id(source) in copies:  # tied
                    continue
                # load_state_dict() may keep the tensors it is given: they must not be ours. Models
                # and optimizers have tensors to write to, which takes no memory.
                target = places.get(path)
                if (
                    target is None
                    or (target.shape, target.dtype) != (source.shape, source.dtype)
                    or memory_of(target) in written  # tied now, but not when it was saved
                ):
                    target = source.clone()
                else:
                    written.add(memory_of(target))
                    targets.append(target)
                    sources.append(source)
                copies[id(source)] = target

            def bring_back() -> None:
                state = copy.deepcopy(kept, dict(copies))
                _copy(targets, sources)
                for name, item in self._stateful.items():
                    try:
                        item.load_state_dict(state[name])
                    except Exception as error:
                        failures[name] = error

            complete(bring_back)
        if failures:
            name, first = next(iter(failures.items()))
            raise RuntimeError(
                f"{', '.join(map(repr, failures))} could not be restored; all else is as it was "
                f"when step {self.step} was saved. {name}: {first!r}"
            ) from first
        return self.step

    def _check_not_swapped(self, what: str) -> None:
        # With a model alone, nobody knows whether the weights that it has are its own.
        for name, item in self._stateful.items():
            if getattr(item, "_swapped", False) is True:  # our optimizers' and averages'
                raise RuntimeError(
                    f"no {what}() within swap_ema() or swap() of {name!r}: the weights are not the "
                    "model's own; leave that block first"
                )

    def _keep(self, states: dict[str, Any], step: int) -> None:
        if isinstance(self._storage, Path):
            self._write(self._storage, states, step)
            return
        buffers: dict[_Path, Tensor] = {}
        copies: dict[int, Tensor] = {}
        by_memory: dict[Any, Tensor] = {}  # what is tied has one copy
        taken: set[int] = set()
        targets, sources = [], []
        for path, source in _tensors(states):
            memory = memory_of(source)
            target = by_memory.get(memory)
            if target is None:
                target = self._buffers.get(path)
                if target is None or id(target) in taken or not self._fits(target, source):
                    target = self._allocate(source)
                by_memory[memory] = target
                taken.add(id(target))
                targets.append(target)
                sources.append(source)
            buffers[path] = copies[id(source)] = target
        kept = copy.deepcopy(states, dict(copies))
        self.step = None  # until the copy is whole: Ctrl-C may come at any time
        _copy(targets, sources)
        self._kept, self._buffers, self.step = kept, buffers, step

    def _fits(self, buffer: Tensor, source: Tensor) -> bool:
        same = (buffer.shape, buffer.dtype) == (source.shape, source.dtype)
        return same and (self._storage == "cpu" or buffer.device == source.device)

    def _allocate(self, source: Tensor) -> Tensor:
        if self._storage == "device":
            return torch.empty_like(source)
        return torch.empty_like(source, device="cpu", pin_memory=source.device.type == "cuda")

    def _write(self, path: Path, states: dict[str, Any], step: int) -> None:
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        whole = False
        try:
            with unfinished.open("wb") as file:
                torch.save({"step": step, "kept": states}, file)
                file.flush()
                os.fsync(file.fileno())
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(unfinished)
            if unsafe:  # it is now that one must know, and not when one needs the file
                raise TypeError(f"{path} can hold tensors and plain values, not {sorted(unsafe)}")
            whole = True
            os.replace(unfinished, path)
            self.step = step
        except BaseException:
            if whole and not unfinished.exists():  # interrupted after the file was replaced
                self.step = step
            unfinished.unlink(missing_ok=True)
            raise

    def _load(self) -> dict[str, Any]:
        step, kept = _read(Path(self._storage))
        if step != self.step:
            raise RuntimeError(
                f"{self._storage} holds step {step}, not step {self.step}: "
                "someone else has written it"
            )
        return kept

    def _check_names(self, kept: Mapping[str, Any], where: str) -> None:
        if kept.keys() != self._stateful.keys():
            raise ValueError(f"{where} is of {list(kept)}, not of {list(self._stateful)}")

    def _check(self, kept: Mapping[str, Any], where: str) -> None:
        """What would not fit in the end shall be told before training goes on for it."""
        self._check_names(kept, where)
        try:
            self._present(kept)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def _present(self, kept: Mapping[str, Any]) -> dict[str, Any]:
        """The state dicts of models and optimizers; ValueError unless the kept ones fit."""
        present: dict[str, Any] = {}
        for name, item in self._stateful.items():
            if isinstance(item, (nn.Module, torch.optim.Optimizer)):
                present[name] = item.state_dict()
                _check_same(name, item, kept[name], present[name])
        return present

    def __enter__(self) -> BestWeights:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None or self.step is not None:
            complete(self.restore)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: the step, and what is kept, unless that is in a file anyway.

        The tensors are the kept ones themselves: the next :meth:`save` overwrites them.
        """
        return {"step": self.step, "kept": self._kept if self.step is not None else {}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what another one kept. The objects themselves stay as they are.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: It is of other names, shapes or groups than the objects are now, or not a
                BestWeights' at all. Or it is of a file, and storage is none; or that file holds
                another step, or something else. Then nothing has changed.
        """
        try:
            step, kept = state_dict["step"], dict(state_dict["kept"])
        except (KeyError, TypeError, ValueError) as error:
            raise not_a_state(state_dict, "BestWeights", error) from error
        if step is None:
            self.step = None
            return
        count("state_dict['step']", step)
        if not kept:
            if not isinstance(self._storage, Path) or not self._storage.is_file():
                raise ValueError(f"state_dict is of a file, and storage is {self._storage!r}")
            found, kept = _read(self._storage, mmap=True)  # most of it need not be read now
            if found != step:
                # Only the user can know whether that one is of this run, and whether to take it.
                later = isinstance(found, int) and found > step
                raise ValueError(
                    f"{self._storage} holds step {found}, but state_dict is of step {step}: "
                    + ("a later best was saved after the checkpoint" if later else "an older file")
                    + f"; to take it, load {{**state_dict, 'step': {found!r}}}"
                )
            self._check(kept, str(self._storage))
            self.step = step
            return
        self._check(kept, "state_dict")
        with torch.inference_mode(False), torch.no_grad():
            self._keep(kept, step)


def not_a_state(state_dict: Any, whose: str, error: Exception) -> ValueError:
    """The error for a state dict that is something else's."""
    what = list(state_dict) if isinstance(state_dict, Mapping) else state_dict
    return ValueError(f"state_dict is not that of {whose}, but has {what!r} ({error!r})")


def _read(path: Path, *, mmap: bool = False) -> tuple[Any, dict[str, Any]]:
    """The step and the states in a file."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # of many kinds
        raise ValueError(f"{path} is not what BestWeights has written: {error}") from error
    if not (isinstance(found, dict) and "step" in found and isinstance(found.get("kept"), dict)):
        what = list(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{path} is not what BestWeights has written, but holds {what}")
    return found["step"], found["kept"]


def _tensors(tree: Any, path: _Path = ()) -> Iterator[tuple[_Path, Tensor]]:
    """The tensors in nested dicts, lists and tuples whose memory can be copied as it is.

    Subclasses of Tensor, and sparse ones, are left to deepcopy.
    """
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _tensors(value, (*path, key))
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from _tensors(value, (*path, index))
    elif type(tree) in (Tensor, nn.Parameter) and tree.layout is torch.strided:
        yield path, tree


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources, non_blocking=True)
    for device in {tensor.device for tensor in [*targets, *sources]}:
        if device.type == "cuda":  # the host may read what it got
            torch.cuda.synchronize(device)


def _check_same(name: str, item: nn.Module | torch.optim.Optimizer, kept: Any, now: Any) -> None:
    """ValueError when a model or an optimizer is no longer what its kept state is of."""
    if isinstance(item, nn.Module):
        if not isinstance(kept, Mapping):
            raise ValueError(f"{name}: a model now, but was none{_SINCE}")
        for entry in [*kept, *now]:
            if entry not in now or entry not in kept:
                when = "was not there" if entry in now else "is no longer there"
                raise ValueError(f"{name}: {entry} {when}{_SINCE}")
        # What a module has as its extra state is its own business.
        before, after = (
            {(entry,): value for entry, value in state.items() if isinstance(value, Tensor)}
            for state in (kept, now)
        )
        for path in before.keys() & after.keys():
            if before[path].dtype != after[path].dtype:
                raise ValueError(
                    f"{name}: {_text(path)} is {after[path].dtype}, but was {before[path].dtype}"
                    f"{_SINCE}"
                )
    else:
        if not isinstance(kept, Mapping) or "param_groups" not in kept:
            raise ValueError(f"{name}: an optimizer now, but was none{_SINCE}")
        sizes = [[len(group["params"]) for group in state["param_groups"]] for state in (kept, now)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{name}: param_groups have {sizes[1]} parameters, but had {sizes[0]}{_SINCE}"
            )
        before, after = dict(_tensors(kept)), dict(_tensors(now))
    for path, tensor in before.items():
        if path in after and after[path].shape != tensor.shape:
            raise ValueError(
                f"{name}: {_text(path)} has the shape {tuple(after[path].shape)}, "
                f"but had {tuple(tensor.shape)}{_SINCE}"
            )


_SINCE = " when it was saved; nothing was restored"


def _text(path: _Path) -> str:
    return ".".join(map(str, path))
