"""Tensors that hold something else within a block, and their own content again after it.

An interrupt (Ctrl-C) may come between any two bytecodes. So what must not stay half done is written
such that it can be called again: it notes what it is about to do before it does it, and leaves out
what it has done.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn


def complete(call: Callable[[], Any]) -> None:
    """Call; again when an interrupt has broken it off, and then the interrupt goes on."""
    try:
        call()
    except Exception:
        raise
    except BaseException:
        call()
        raise


class Block(AbstractContextManager[None]):
    """A context manager that is entered as a whole or not at all, and left as a whole.

    Not so a generator's, which is left entered by an interrupt between its ``yield`` and the block.
    (Against one before the first bytecode of ``__exit__``, nothing helps.)
    """

    _entered = False

    def _enter(self) -> None:
        """Enter; sets ``_entered`` before the first change. :meth:`_leave` follows on any error."""
        raise NotImplementedError

    def _leave(self) -> None:
        """Undo what has been done, unless that is undone; resets ``_entered`` after the last."""
        raise NotImplementedError

    def _complain(self, error: BaseException | None) -> None:
        """Raise what has to be told after all is done; ``error`` is the block's."""

    def __enter__(self) -> None:
        if self._entered:
            raise RuntimeError("a block within itself")
        try:
            self._enter()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:  # at once, and not within complete(): its call would be one more place for interrupts
            self._leave()
        except Exception:
            raise
        except BaseException:
            self._leave()
            raise
        self._complain(error)


def _storage(tensor: Tensor) -> tuple[int, int]:
    """Where the storage begins, and its bytes; 0, 0 when that is not to be had."""
    if tensor.layout is torch.strided:
        storage = tensor.untyped_storage()
        with suppress(RuntimeError):  # of tensors that are made of others, such as DTensor
            return storage.data_ptr(), storage.nbytes()
    return 0, 0


def memory_of(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same elements of the same memory, or have no address."""
    if not _storage(tensor)[0]:
        return ()
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def write(target: Tensor, source: Tensor) -> None:
    """Copy a tensor of the same shape into another's memory, whoever made that and in what mode.

    To be called without gradients, and outside of inference mode, where nobody is told of a write.
    """
    if target.layout is torch.strided:
        # Elements that share memory, as expand() makes them, are written once.
        for dim in (d for d, stride in enumerate(target.stride()) if stride == 0):
            if target.shape[dim]:
                target, source = target.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
    if not target.is_inference():
        target.copy_(source)
        return
    with torch.inference_mode():  # the only place where such a tensor can be written to
        target.copy_(source)


def alone(tensors: list[Tensor]) -> list[bool]:
    """For each tensor, whether no other one is in the same memory, or in another part of it."""
    ranges = []
    for index, tensor in enumerate(tensors):
        start, nbytes = _storage(tensor)
        if nbytes:
            ranges.append((str(tensor.device), start, start + nbytes, index))
    result = [True] * len(tensors)
    furthest = ("", 0, 0)  # of those before: the device, where it ends, and whose that is
    for device, start, end, index in sorted(ranges):
        if device == furthest[0] and start < furthest[1]:
            result[index] = result[furthest[2]] = False
        if (device, end) > furthest[:2]:
            furthest = (device, end, index)
    return result


def _version(tensor: Tensor) -> int:
    """Changes when a tensor is written to; -1: nobody knows."""
    return -1 if tensor.is_inference() else tensor._version


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether a tensor has the values that another one has in its dtype."""
    return bool(torch.isclose(one, other.to(one), rtol=0, atol=0, equal_nan=True).all())


class Loan:
    """A tensor, its own content, and what it holds instead for a while.

    Args:
        name: For messages.
        tensor: Of a model, say. Its memory counts that it has now, and so it has after the loan:
            also when someone puts other memory there. (But when that is on another device, the
            model has moved, and the content follows it.)
        value: What it shall hold, of the same shape; None: anything.
        exchange: Keep its own content in the value meanwhile, and not in a copy. Only for tensors
            that are :func:`alone`, of the value's dtype.
        returns: The value takes what has been written to the tensor meanwhile.
    """

    def __init__(
        self,
        name: str,
        tensor: Tensor,
        value: Tensor | None = None,
        *,
        exchange: bool = False,
        returns: bool = False,
    ) -> None:
        if value is not None and value.shape != tensor.shape:
            raise ValueError(
                f"{name} has the shape {tuple(tensor.shape)}, its average {tuple(value.shape)}"
            )
        self.name, self.tensor, self.value = name, tensor, value
        self.exchange, self.returns = exchange, returns
        self.written = False
        self._memory = tensor.detach()
        self._nbytes = _storage(self._memory)[1]
        self._own: Tensor | None = None  # None: it is in its place, or the value has it
        self._owed: Tensor | None = None  # what the value has to take yet
        self._version: int | None = None
        self._ended = False

    def keep(self) -> None:
        """Remember the content. Nothing is written."""
        if not self.exchange:
            self._own = self._memory.clone()

    def lend(self) -> None:
        """Write the value."""
        if self.value is None:
            return
        if self.exchange:
            self._own = self._memory.clone()
        write(self._memory, self.value)
        if self.exchange:
            assert self._own is not None
            self._owed = self._memory
            write(self.value, self._own)
            self._own = None

    def look(self) -> None:
        """Remember that all is written, so that later writes are someone else's."""
        self._version = _version(self.tensor)

    def is_disturbed(self) -> bool:
        """Whether someone else has written since, or may have."""
        version = _version(self.tensor)
        return version == -1 or version != self._version

    def end(self, now: Tensor) -> None:
        """Find what has been written meanwhile; ``now`` is in the tensor's place in the model."""
        if self._ended:
            return
        if self._version is not None and self.value is not None and self.returns:
            version = _version(self.tensor)
            if self._is_freed():  # torch would not notice, and read what is not there
                self.written, self._owed = self.exchange, None
                if self.exchange:
                    self._own = self.value.clone()
            elif self.exchange:
                self.written = version != self._version
            elif version != self._version or version == -1:
                self.written = not _same(self._memory, self.value)
                self._owed = self._memory if self.written else None
            if self._is_new_buffer(now):
                self._owed = now.detach()
        self._ended = True

    def _is_freed(self) -> bool:
        return _storage(self._memory)[1] < self._nbytes

    def _is_new_buffer(self, now: Tensor) -> bool:
        """Whether someone has put a buffer in the tensor's place, and not only moved the model."""
        return (
            not isinstance(self.tensor, nn.Parameter)
            and not self._is_freed()
            and memory_of(now) != memory_of(self._memory)
            and now.shape == self._memory.shape
            and not _same(now, self._memory)
        )

    def settle(self) -> None:
        """Let the value have what it is owed."""
        if self._owed is not None and self.value is not None:
            if self._own is None:
                self._own = self.value.clone()
            write(self.value, self._owed)
            self._owed = None

    def restore(self) -> None:
        """Give the tensor its content back, in its own memory. Can be called again."""
        if self.exchange:
            self.settle()
        if self._own is None:
            return
        tensor, memory = self.tensor, self._memory
        if self._is_freed():
            memory = self._own.clone()
        else:
            write(memory, self._own)
        if memory_of(tensor) != memory_of(memory):
            tensor.data = memory if tensor.device == memory.device else self._own.to(tensor.device)
        if self.exchange:
            self._own = None


_KINDS = ("_parameters", "_buffers")

# A module, the name of one of its dicts, a key in there, and the tensor or None.
_Place = tuple[nn.Module, str, str, Tensor | None]


def _places(model: nn.Module) -> list[_Place]:
    return [
        (module, kind, key, tensor)
        for module in model.modules()
        for kind in _KINDS
        for key, tensor in getattr(module, kind).items()
    ]


def _in_place(place: _Place) -> Any:
    module, kind, key, _ = place
    entries = getattr(module, kind)
    return entries[key] if key in entries else None  # noqa: SIM401 # a scripted module has no get()


def _put_back(place: _Place) -> None:
    module, kind, key, tensor = place
    now = _in_place(place)
    if now is tensor:
        return
    if (
        isinstance(now, Tensor)
        and tensor is not None
        and now.device != tensor.device
        and now.shape == tensor.shape
    ):
        now.data = tensor.detach().to(now.device)  # the model has moved
    else:
        vars(module).pop(key, None)  # which would hide it
        getattr(module, kind)[key] = tensor


# A module, the name of one of its dicts, and the keys in there, None's among them.
_Order = tuple[nn.Module, str, list[str]]


def _orders(model: nn.Module) -> list[_Order]:
    return [
        (module, kind, list(vars(module)[kind]))
        for module in model.modules()
        for kind in _KINDS
        if type(vars(module).get(kind)) in (dict, OrderedDict)  # a scripted module has neither
    ]


def _sort(order: _Order) -> None:
    """What was taken out and put back is before what came after it, as parameters() gives it."""
    module, kind, keys = order
    entries = vars(module)[kind]
    known = set(keys)
    wanted = [key for key in keys if key in entries]
    wanted += [key for key in entries if key not in known]
    if list(entries) != wanted:  # at once, so that an interrupt finds the one or the other
        vars(module)[kind] = type(entries)((key, entries[key]) for key in wanted)


# The swaps whose blocks are entered, of whichever models.
_open: WeakValueDictionary[int, Swap] = WeakValueDictionary()


def _undisturbed_loans() -> Iterator[Loan]:
    """Of the swaps whose blocks are entered; of what is exchanged, which only versions tell of."""
    for reference in _open.valuerefs():  # at once, whatever other threads do
        swap = reference()
        for loan in swap._loans if swap is not None else ():
            if loan.exchange and not loan.is_disturbed():
                yield loan


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same elements, and share a version when one is a view."""
    return memory_of(tensor) or (id(tensor),)


class Swap(Block):
    """Within the block, tensors hold other values; after it all of them have their own, to the bit.

    All are kept before the first is written (but for those that are exchanged), because they may
    share memory. Where they do, the last one's value is what is there. After the block, all is
    given back that can be, and then an error tells what could not.

    Args:
        owner: Its attribute ``_swapped`` is True as long as the block lasts.
        loans: Makes the loans when the block is entered, or raises.
        what: Whose block it is, for messages.
        model: Where the tensors are, or some of them. What the block has put into their places is
            taken out again. None: nobody knows where they are.
    """

    def __init__(
        self,
        owner: Any,
        loans: Callable[[], list[Loan]],
        what: str,
        model: nn.Module | None = None,
    ) -> None:
        self._owner, self._make, self._what, self._model = owner, loans, what, model
        self._loans: list[Loan] = []
        self._places: list[_Place] = []
        self._orders: list[_Order] = []
        self._around: list[Loan] = []  # of the swaps around this one, those it leaves as they were
        self._failures: dict[str, Exception] = {}
        self._written: list[str] = []

    def with_all_of(self, model: nn.Module) -> Swap:
        """The same, which also gives all else of a model back, and everything in its place."""

        def loans() -> list[Loan]:
            made = self._make()
            known = {id(loan.tensor) for loan in made}
            named = (*model.named_parameters(), *model.named_buffers())
            return [*made, *(Loan(name, t) for name, t in named if id(t) not in known)]

        return Swap(self._owner, loans, self._what, model)

    def _enter(self) -> None:
        self._failures, self._written = {}, []
        with torch.inference_mode(False), torch.no_grad():
            self._loans = self._make()
            lent = {_identity(loan.tensor) for loan in self._loans}
            self._around = [x for x in _undisturbed_loans() if _identity(x.tensor) in lent]
            self._places = [] if self._model is None else _places(self._model)
            self._orders = [] if self._model is None else _orders(self._model)
            self._entered = True
            _open[id(self)] = self
            self._owner._swapped = True
            for loan in self._loans:
                loan.keep()
            for loan in self._loans:
                loan.lend()
            for loan in self._loans:
                loan.look()

    def _leave(self) -> None:
        if not self._entered:
            return
        with torch.inference_mode(False), torch.no_grad():
            others = {
                id(place[3]): _in_place(place)
                for place in reversed(self._places)
                if isinstance(_in_place(place), Tensor)
            }
            for loan in self._loans:
                self._try(loan.name, loan.end, others.get(id(loan.tensor), loan.tensor))
            for loan in self._loans:
                if not loan.exchange:
                    self._try(loan.name, loan.settle)
            for loan in self._loans:
                self._try(loan.name, loan.restore)
            for place in self._places:
                self._try(place[2], _put_back, place)
            for order in self._orders:
                self._try(order[1], _sort, order)
            for loan in self._around:
                self._try(loan.name, loan.look)
        spoilt = [x for x in self._loans if x.written]
        self._written = [x.name for x in spoilt if isinstance(x.tensor, nn.Parameter)]
        self._owner._swapped = False
        _open.pop(id(self), None)
        self._entered = False
        self._loans, self._places, self._orders, self._around = [], [], [], []

    def _try(self, name: str, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:
            self._failures.setdefault(name, error)

    def _complain(self, error: BaseException | None) -> None:
        if self._failures:
            name, first = next(iter(self._failures.items()))
            raise RuntimeError(
                f"after the block of {self._what}, {', '.join(self._failures)} could not be given "
                f"back; all else has been. {name}: {first}"
            ) from first
        if error is None and self._written:
            raise RuntimeError(
                f"the block of {self._what} has written to {self._written[0]!r}; that was the "
                "average, which is spoilt now. The model has its own weights"
            )
