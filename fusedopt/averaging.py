"""Averages of the weights over a training run.

They are kept wider than the model: in bfloat16 a decay of 0.999 would move nothing, for the step is
below half the distance between neighbours. Those of checkpoints and of predictions are in
``ensemble.py``; their names are to be imported from here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fusedopt.arguments import below_one, count, flag, one_of, torch_module
from fusedopt.ensemble import average_checkpoints, average_predictions, has_mean, interpolate
from fusedopt.optimizer import FusedOptimizer
from fusedopt.swapping import Loan, Swap, alone, complete, write

__all__ = [
    "EMA",
    "SWA",
    "FusedEMA",
    "WeightAverage",
    "average_checkpoints",
    "average_predictions",
]

# So many elements are widened at a time. All at once would need the average's memory again, and on
# the CPU new memory costs more than the arithmetic.
_BATCH = 1 << 20


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _batches(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of what foreach operations take at once: of one device and dtype, and not too large."""
    kinds = {name: f"{tensor.device} {tensor.dtype}" for name, tensor in tensors.items()}
    batches: list[list[str]] = []
    kind, size = "", 0
    for name in sorted(tensors, key=lambda name: kinds[name]):
        size += tensors[name].numel()
        if kinds[name] != kind or size > _BATCH:
            batches.append([])
            kind, size = kinds[name], tensors[name].numel()
        batches[-1].append(name)
    # The largest is the last, and the first to be written: so when memory runs out, nothing is.
    return sorted(batches, key=lambda names: sum(_bytes(tensors[n]) for n in names))


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and buffers by name; what is shared has its first name."""
    return {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}


def _check_same(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], whose: str) -> None:
    for name in (*mine, *theirs):
        if name not in theirs:
            raise ValueError(f"{whose} has no {name!r}, which the average has")
        if name not in mine:
            raise ValueError(f"{whose} has {name!r}, which the average has not")
        if theirs[name].is_meta and not mine[name].is_meta:
            raise ValueError(f"{whose} has {name!r} on the device 'meta', without values")
        if theirs[name].shape != mine[name].shape:
            raise ValueError(
                f"{whose} has {name!r} in the shape {tuple(theirs[name].shape)}, "
                f"the average in {tuple(mine[name].shape)}"
            )


def _give(model: nn.Module, averages: Mapping[str, Tensor]) -> None:
    """Copy all of it, whatever interrupts; where memory is shared, as :meth:`swap` does."""

    def give() -> None:
        for name, tensor in (*model.named_buffers(), *model.named_parameters()):
            write(tensor.detach(), averages[name])

    with torch.inference_mode(False), torch.no_grad():
        complete(give)


class WeightAverage:
    """What :class:`EMA` and :class:`SWA` share: the average itself, and how it is used.

    Attributes:
        averages: The averages by the names of the model's parameters and buffers. None of them
            requires grad or shares memory with the model. Within :meth:`swap` they are elsewhere.
        n_averaged: How often the weights were averaged.
    """

    _kind = "average"

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int,
        start: int,
        dtype: torch.dtype,
        device: torch.device | str | int | None,
        buffers: str,
    ) -> None:
        self._every, self._start = every, start
        one_of("copy", "average")("buffers", buffers)
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"dtype must be torch.float32 or torch.float64: {dtype!r}; a narrower average "
                "stands still, as each step is lost in rounding"
            )
        try:
            place = None if device is None else torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"device is not a device: {device!r} ({error})") from None
        tensors = _tensors_of(torch_module("model", model))
        copied = {name for name, tensor in tensors.items() if not has_mean(tensor)}
        if buffers == "copy":
            copied.update(name for name, _ in model.named_buffers())
        with torch.inference_mode(False):  # or it could not be written to outside of that
            self.averages = {
                name: t.to(
                    place,
                    t.dtype if name in copied else torch.promote_types(t.dtype, dtype),
                    copy=True,
                )
                for name, t in tensors.items()
            }
        self._copied = [name for name in tensors if name in copied]
        self._batches = _batches({n: t for n, t in self.averages.items() if n not in copied})
        if not self._batches:
            raise ValueError("model has nothing to average: no parameters")
        # A checkpoint has all names of what is shared, and leaves out what is not persistent.
        first_names = {
            id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())
        }
        self._saved = {
            name: first_names[id(value)]
            for name, value in model.state_dict(keep_vars=True).items()
            if id(value) in first_names
        }
        self.n_averaged = 0
        self._calls = 0
        self._swapped = False

    def _weight(self) -> float:
        """The weight of the model in the next average."""
        raise NotImplementedError

    def _match(self, model: nn.Module, what: str) -> dict[str, Tensor]:
        """A model's tensors, when they are those that are averaged."""
        self._check_not_swapped(what)
        tensors = _tensors_of(torch_module("model", model))
        _check_same(self.averages, tensors, "the model")
        return tensors

    def _check_not_swapped(self, what: str) -> None:
        if self._swapped:
            raise RuntimeError(f"no {what}() within swap(): the model has the average")

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model's weights, after its optimizer's step. Waits for no device.

        (When the average is on the CPU and the model is not, the copy has to wait.) An interrupt
        (Ctrl-C) goes on when all of them are taken in, or before any is.

        Args:
            model: Its parameters and buffers have the names and shapes of the first model's.

        Raises:
            ValueError: They have not; the message has the first name that differs.
            RuntimeError: Within :meth:`swap`.
        """
        live = self._match(model, "update")
        calls = self._calls + 1
        n_averaged = self.n_averaged
        shares: list[tuple[list[str], float]] = []  # names, and the weight of the model in these
        if calls <= self._start:
            shares = [(list(self.averages), 1.0)]
        elif (calls - self._start) % self._every == 0:
            weight = self._weight()
            shares = [(self._copied, 1.0)] if self._copied else []
            shares += [(names, weight) for names in self._batches]
            n_averaged += 1
        # Each is written by one call, which raises the version: an interrupt may come after that,
        # but not within.
        versions = [self.averages[names[0]]._version for names, _ in shares]

        def take_in() -> None:
            while shares:
                names, weight = shares[-1]
                if self.averages[names[0]]._version == versions[len(shares) - 1]:
                    interpolate([self.averages[n] for n in names], [live[n] for n in names], weight)
                shares.pop()
            self.n_averaged, self._calls = n_averaged, calls

        complete(take_in)

    def swap(self, model: nn.Module) -> Swap:
        """Within the block, the model has the average, and this has the model's own weights.

        They are exchanged in place, tensor by tensor. Of those whose dtype is not the average's,
        and of those that share memory (parts of one storage do), there is a copy meanwhile. Where
        parameters and buffers share memory, it is the parameters' averages that are in there.

        After the block, also when it raises, the model has its weights and buffers again, to the
        bit, in their own memory, also when the block has replaced or removed some. What the block
        does to buffers stays with the average: ``torch.optim.swa_utils.update_bn`` belongs here.
        (A buffer of another shape does not fit there, and is dropped.)

        Args:
            model: As for :meth:`update`.

        Returns:
            A context manager.

        Raises:
            ValueError: The model does not match the average.
            RuntimeError: A block within one of the same average. Or the block has written to a
                parameter: that was the average, which has what was written now. Or, after all else
                has been given back, something could not be; the message names it.
        """

        def loans() -> list[Loan]:
            self._match(model, "swap")
            tensors = dict((*model.named_buffers(), *model.named_parameters()))
            exclusive = alone(list(tensors.values()))
            return [
                Loan(
                    name,
                    tensor,
                    self.averages[name],
                    exchange=is_alone and tensor.dtype == self.averages[name].dtype,
                    returns=True,
                )
                for (name, tensor), is_alone in zip(tensors.items(), exclusive, strict=True)
            ]

        return Swap(self, loans, "swap()", model)

    def copy_to(self, model: nn.Module) -> None:
        """Give a model the averages, in its own dtypes, for good.

        Args:
            model: As for :meth:`update`; often a copy, or a new model of the same class.

        Raises:
            ValueError: It does not match the average.
            RuntimeError: Within :meth:`swap`.
        """
        self._match(model, "copy_to")
        _give(model, self.averages)

    def state_dict(self) -> dict[str, Any]:
        """The average in the layout of ``torch.optim.swa_utils.AveragedModel``, which can load it.

        That is ``n_averaged``, and the model's names after ``module.``. As a module's, it refers to
        the tensors and does not copy them. Its ``_metadata`` has whose it is, and how often
        :meth:`update` was called; when that gets lost, a resumed run takes it that the last call
        averaged.

        Raises:
            RuntimeError: Within :meth:`swap`.
        """
        self._check_not_swapped("state_dict")
        state: OrderedDict[str, Any] = OrderedDict(
            n_averaged=torch.tensor(self.n_averaged, device="cpu")
        )
        state.update({f"module.{name}": self.averages[mine] for name, mine in self._saved.items()})
        state._metadata = {"": {"calls": self._calls, "kind": self._kind}}  # type: ignore[attr-defined]
        return state

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint of this class or of ``AveragedModel``. Copies it.

        Decay, start and the like are those of the constructor. When it raises, nothing has changed;
        an interrupt (Ctrl-C) goes on when all has, or nothing.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            TypeError: An entry that should be a tensor is none, or a count is no integer.
            ValueError: It does not match; the message has the first name that differs. Or a count
                is negative. Or it is an :class:`EMA`'s, and this is an :class:`SWA`, or the other
                way round.
            RuntimeError: Within :meth:`swap`.
        """
        self._check_not_swapped("load_state_dict")
        metadata = getattr(state_dict, "_metadata", {}).get("", {})
        kind = metadata.get("kind", self._kind)  # torch's has none, and may be of either
        if kind != self._kind:
            raise ValueError(f"state_dict is of an average of the kind {kind}, not {self._kind}")
        loaded = {n.removeprefix("module."): t for n, t in state_dict.items() if n != "n_averaged"}
        if "n_averaged" not in state_dict:
            raise ValueError("state_dict has no 'n_averaged'")
        n_averaged = count("state_dict['n_averaged']", state_dict["n_averaged"])
        guess = self._start + n_averaged * self._every if n_averaged else 0
        calls = count("state_dict._metadata['']['calls']", metadata.get("calls", guess))
        mine = {name: self.averages[first] for name, first in self._saved.items()}
        for name in mine:
            if name in loaded and not isinstance(loaded[name], Tensor):
                raise TypeError(f"state_dict has {name!r}, which is no tensor: {loaded[name]!r}")
        _check_same(mine, loaded, "state_dict")
        # What cannot be had in the average's form is refused before anything is written.
        values = {name: loaded[name].detach().to(average) for name, average in mine.items()}

        def take_over() -> None:
            for name, average in mine.items():
                average.copy_(values[name])
            self.n_averaged, self._calls = n_averaged, calls

        complete(take_over)


class EMA(WeightAverage):
    """An exponential moving average of a model's weights, for any optimizer.

    It begins as a copy of the weights. Then, in the t-th average (t = 1, 2, ...)::

        d   = min(decay, (1 + t) / (10 + t))    or decay, without warmup
        ema = ema + (1 - d) (weight - ema)

    which is d ema + (1 - d) weight. The warm-up is that of the optimizers' ``ema_warmup`` (and of
    TensorFlow's ``ExponentialMovingAverage``). Averages of iterates: Polyak & Juditsky 1992.

    With one of our optimizers, ``ema_decay`` does the same within the step, and :class:`FusedEMA`
    uses it.

    Args:
        model: Whose parameters to average. Not kept. Those of integers are copied.
        decay: In [0, 1). The average looks back over about 1 / (1 - decay) updates.
        warmup: Whether the decay grows up to that, so that a young average does not remember the
            model's initial weights.
        update_every: Average in every so many calls of :meth:`update`. The decay is for each
            average, not for each call.
        start: In so many first calls, copy the weights instead.
        dtype: What to average in, torch.float32 or torch.float64. What is wider stays as wide.
        device: Where to keep the average; None: where the model is.
        buffers: ``"copy"``: the average has the model's latest. ``"average"``: those of
            floating-point numbers are averaged as the parameters are.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument is out of its range; or the model has no parameters.

    Example::

        ema = EMA(model, decay=0.999)
        for batch in loader:
            ...
            optimizer.step()
            ema.update(model)
        with ema.swap(model):
            evaluate(model)
    """

    _kind = "EMA"

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.999,
        *,
        warmup: bool = True,
        update_every: int = 1,
        start: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | int | None = None,
        buffers: str = "copy",
    ) -> None:
        self._decay = below_one("decay", decay)
        self._warmup = flag("warmup", warmup)
        super().__init__(
            model,
            every=count("update_every", update_every, 1),
            start=count("start", start, 0),
            dtype=dtype,
            device=device,
            buffers=buffers,
        )

    @property
    def current_decay(self) -> float:
        """The decay of the next average."""
        t = self.n_averaged + 1
        return min(self._decay, (1 + t) / (10 + t)) if self._warmup else self._decay

    def _weight(self) -> float:
        return 1 - self.current_decay


class SWA(WeightAverage):
    """Stochastic weight averaging: the mean of a model's weights at several times, equally.

    It is a running mean. With the n-th set of weights (n = 1, 2, ...)::

        swa = swa + (weight - swa) / n

    Until the first, the average is a copy of the weights. Izmailov et al. 2018, Averaging Weights
    Leads to Wider Optima and Better Generalization. The learning rate should be high and constant,
    or cyclic, meanwhile. Batch norm's statistics are not those of the averaged weights; have
    ``torch.optim.swa_utils.update_bn(loader, model)`` find them within :meth:`swap`.

    Args:
        model: Whose parameters to average. Not kept. Those of integers are copied.
        start: How many calls of :meth:`update`, be it steps or epochs, to let pass.
        every: Average in every so many calls after that: at the end of each cycle.
        dtype: As for :class:`EMA`.
        device: As for :class:`EMA`.
        buffers: As for :class:`EMA`.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument is out of its range; or the model has no parameters.
    """

    _kind = "SWA"

    def __init__(
        self,
        model: nn.Module,
        *,
        start: int,
        every: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | int | None = None,
        buffers: str = "copy",
    ) -> None:
        super().__init__(
            model,
            every=count("every", every, 1),
            start=count("start", start, 0),
            dtype=dtype,
            device=device,
            buffers=buffers,
        )

    def _weight(self) -> float:
        return 1 / (self.n_averaged + 1)


class FusedEMA:
    """The average that an optimizer keeps within its step, used as an :class:`EMA`.

    The optimizer has an ``ema_decay``; its step has updated the average already, so there is no
    ``update()``, and its checkpoint has the average, so there is no ``state_dict()``.

    The optimizer knows nothing of buffers. The average has the model's own, as they are: the same
    as ``EMA(buffers="copy")`` has right after an update. :meth:`swap` gives them back as they were.

    Parameters that the optimizer does not have, or has not updated yet, are their own average.

    Args:
        optimizer: One of ours, with an ``ema_decay``.
        model: Whose parameters it updates. Both are kept.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The optimizer keeps no average; or a parameter that requires grad is not its.
    """

    def __init__(self, optimizer: FusedOptimizer, model: nn.Module) -> None:
        if not isinstance(optimizer, FusedOptimizer):
            raise TypeError(f"optimizer is none of fusedopt's: {type(optimizer).__name__}")
        if optimizer.ema_decay is None:
            raise ValueError("optimizer keeps no average: its ema_decay is None")
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, p in torch_module("model", model).named_parameters():
            if p.requires_grad and id(p) not in known:
                raise ValueError(f"model has the parameter {name!r}, which optimizer has not")
        self._optimizer, self._model = optimizer, model

    def swap(self, model: nn.Module) -> Swap:
        """Within the block, the model has the average.

        Whatever happens in the block, the model has its weights and buffers again after it, to the
        bit, in their own memory. What the block does to them is dropped with that. Costs a copy of
        the model while it lasts. All parameters of the optimizer are swapped, also those of another
        model.

        Args:
            model: The constructor's.

        Returns:
            A context manager.

        Raises:
            ValueError: It is another.
            RuntimeError: A block within one of the same average; or there is no ``ema_decay`` any
                more. Or, after all else has been given back, something could not be; the message
                names it.
        """
        if model is not self._model:
            raise ValueError("model is not the one whose parameters the optimizer updates")
        return self._optimizer.swap_ema().with_all_of(model)

    def copy_to(self, model: nn.Module) -> None:
        """Give a model the average and the trained model's buffers, in its own dtypes, for good.

        Args:
            model: A copy, or a new model of the same class.

        Raises:
            ValueError: Its names or shapes differ; the message has the first that does.
            RuntimeError: There is no ``ema_decay`` any more.
        """
        if self._optimizer.ema_decay is None:
            raise RuntimeError("the optimizer keeps no average any more: its ema_decay is None")
        source = dict(self._model.named_parameters())
        state = self._optimizer.state
        averages = {
            name: state[p]["ema"] if "ema" in state.get(p, ()) else p for name, p in source.items()
        }
        averages.update(self._model.named_buffers())
        _check_same(averages, _tensors_of(torch_module("model", model)), "the model")
        _give(model, averages)
