"""What all fused optimizers share: the step, accumulation, and checkpoints."""

from __future__ import annotations

import dis
import inspect
import math
import sys
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CodeType, FrameType
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fusedopt import device
from fusedopt.arguments import count, shown
from fusedopt.extension import kernels
from fusedopt.options import (
    ARGUMENTS,
    CARRIED,
    OPTIONS,
    RECORD,
    Option,
    StepOptions,
    carried_by,
    check_carried,
    check_that_all_carry,
    with_options,
)
from fusedopt.profiling import phase
from fusedopt.state import (
    HALF,
    HIDDEN,
    ON_CPU,
    adopt,
    blocks_of,
    check,
    counter,
    encode,
    export,
    hidden_part,
    like,
    rule_values,
    whole_weight,
    wide_counter,
    wide_dtype,
)
from fusedopt.swapping import Loan, Swap

# Where a checkpoint's record has the micro-batches of an open window.
_WINDOW = "micro_batches"
_MOST_MICRO_BATCHES = 2**53  # what float64, the divisor, can count

# (group, index within the group, what) of one parameter.
_Missing = list[tuple[int, int, list[str]]]
_Fallback = list[tuple[int, int, str]]
# (parameter, the state that was there before).
_Created = list[tuple[Tensor, dict[str, Any]]]


def _references(tensor: Tensor) -> tuple[int, int, int] | None:
    """How many refer to a tensor's memory, storage object and self; None when torch won't tell."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None:
        return None
    storage = tensor.untyped_storage()
    return count(storage._cdata), sys.getrefcount(storage), weakref.getweakrefcount(tensor)


_NO_OTHER_REFERENCES = _references(torch.zeros((), device="cpu"))


def _unshared(tensor: Tensor) -> bool:
    """Whether no view, exported storage or weak reference leads to a tensor's memory."""
    return _NO_OTHER_REFERENCES is not None and _references(tensor) == _NO_OTHER_REFERENCES


def _callers() -> Iterator[FrameType]:
    """The frames that lead here, the innermost first, but for torch's and ours."""
    frame = inspect.currentframe()
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in ("torch", "fusedopt"):
            yield frame
        frame = frame.f_back


def _clipping_between(code: CodeType, accumulated: int, now: int) -> str | None:
    """What code loads to clip gradients on its way from one offset to another.

    A way back leads through a loop. Then what is clipped may be each micro-batch, which is right;
    but not when it leads straight to where the code is now, where others go to accumulate().
    """
    loaded = {*code.co_names, *code.co_varnames, *code.co_freevars}
    names = {"clip_grad_norm_", "clip_grad_value_"} & loaded
    found = None
    for instruction in dis.get_instructions(code) if names else ():
        if instruction.offset >= now:
            break
        if instruction.offset <= accumulated < now:
            continue
        if instruction.opname.startswith("LOAD_") and instruction.argval in names:
            found = str(instruction.argval)
        elif accumulated > now and "JUMP" in instruction.opname:
            found = None
    return found


def _warn_of_partial_norm() -> None:
    """Warn when the optimizer is made to update one process's share of the parameters only."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = inspect.currentframe()
    while module is not None and frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, module.ZeroRedundancyOptimizer) and owner.world_size > 1:
            warnings.warn(
                "Under ZeroRedundancyOptimizer, max_grad_norm and nonfinite see the gradients of "
                "the parameters that this process updates, and not those of the others: with "
                f"{owner.world_size} processes, clip before the step.",
                stacklevel=2,
            )
            return
        frame = frame.f_back


def _check_kind(state_dict: Mapping[str, Any]) -> None:
    """ValueError when something is not an optimizer's state dict at all."""
    groups = state_dict.get("param_groups")
    if not isinstance(state_dict.get("state"), Mapping) or not isinstance(groups, (list, tuple)):
        raise ValueError(
            "state_dict is not an optimizer's, with a dict 'state' and a list 'param_groups', but "
            f"has {shown(list(state_dict))}"
        )
    for index, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            raise ValueError(
                f"param_groups[{index}] of the checkpoint is not a dict with a list 'params': "
                f"{shown(group)}"
            )


def _remember(
    loaded: dict[str, Any], optimizer: torch.optim.Optimizer, checkpoint: dict[str, Any]
) -> None:
    """Look at a checkpoint before torch takes it over, and keep it for after that."""
    assert isinstance(optimizer, FusedOptimizer)
    if optimizer._loading is not loaded:
        return
    _check_kind(checkpoint)
    for index, group in enumerate(checkpoint["param_groups"]):
        missing = [n for n in kernels.family_hypers(optimizer._family) if n not in group]
        if missing:
            raise ValueError(
                f"param_groups[{index}] of the checkpoint has no {', '.join(missing)}, which "
                f"{type(optimizer).__name__} needs; it has {', '.join(map(str, group))}"
            )
        for i in group["params"]:
            state = checkpoint["state"].get(i, {})
            if not isinstance(state, dict):
                raise ValueError(f"state[{i!r}] of the checkpoint is not a dict: {shown(state)}")
    loaded.update(checkpoint)


class FusedOptimizer(StepOptions, torch.optim.Optimizer):
    """The fused step, to be mixed into a stock optimizer class before that class.

    A subclass names its rule family (``csrc/rules.h``) and the stock class it replaces. Beside
    that class's arguments, the constructor takes these, by keyword. They stay attributes and may be
    changed between steps; a checkpoint has them, too. ``docs/pipeline.md`` has the order of
    operations, the bytes moved, and recipes.

    Args:
        max_grad_norm: Clip the norm of all gradients of all groups to this, inside the step, as
            ``torch.nn.utils.clip_grad_norm_`` would before it; but no gradient is written.
            Positive; inf measures and never clips. None: don't.
        grad_norm_type: 2.0 (default) or inf.
        max_grad_value: Clip every gradient element to [-max_grad_value, max_grad_value], as
            ``torch.nn.utils.clip_grad_value_``. Not together with ``max_grad_norm``.
        nonfinite: What a nan or inf among the gradients does: ``"propagate"`` into the weights,
            as stock (default); ``"skip"`` the step, which leaves parameters and state as they
            are, drops what was accumulated, and counts in :attr:`skipped_steps`; ``"raise"``: the
            same, and RuntimeError (but a step that a gradient scaler has found bad is skipped).
        weight_precision: How bfloat16 and float16 parameters are updated: ``"nearest"`` rounds
            (default); ``"master"`` keeps a float32 copy in the state; ``"remainder"`` (bfloat16
            only) its lower 16 bits, to the same effect; ``"stochastic"`` rounds at random, right
            in the mean; ``"kahan"`` keeps what rounding took, in 16 bits. A weight that someone
            overwrites between two steps wins over the hidden part.
        state_dtype: What the rule's state is kept in: ``torch.float32``, ``torch.bfloat16``, or
            ``torch.uint8`` for 8 bits with a scale for each 256 elements (``csrc/quantize.h``);
            the last two are rounded at random, right in the mean.
            None: the parameter's dtype, or float32 for 16-bit parameters whose
            ``weight_precision`` is not ``"nearest"``.
        ema_decay: Keep ``state["ema"]``, an average of the weights: a copy before the first step,
            then ``ema = ema_decay * ema + (1 - ema_decay) * weight``. In [0, 1). Setting it to
            None drops the average.
        ema_warmup: Use the decay ``min(ema_decay, (1 + t) / (10 + t))`` in step t.
        l1: After each update bring every weight nearer to zero by ``lr * l1``, and to exactly
            zero those that are nearer than that (the proximal operator of ``l1 * |w|``). A
            parameter group may have an ``"l1"`` of its own.
    """

    _family: ClassVar[str]
    _stock: ClassVar[type[torch.optim.Optimizer]]

    # A GradScaler hands such an optimizer its scale and its verdict, instead of rewriting the
    # gradients before the step: the division happens in the kernel.
    _step_supports_amp_scaling = True

    def __init__(self, *args: Any, **options: Any) -> None:
        given = {name: options.pop(name) for name in ARGUMENTS if name in options}
        Option.set_all(self, given)
        super().__init__(*args, **options)
        check_that_all_carry(self.param_groups, given)
        self._recreate_early_state()
        if self._measures():
            _warn_of_partial_norm()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("__init__")
        signature = inspect.signature(own if own is not None else cls._stock.__init__)
        parameters = list(signature.parameters.values())[1:]
        signature = signature.replace(parameters=parameters)
        if own is None or any(p.name == "options" and p.kind == p.VAR_KEYWORD for p in parameters):
            signature = with_options(signature)
        cls.__signature__ = signature  # type: ignore[attr-defined] # for inspect and help()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as stock; ValueError when an option of the step does not fit it.

        A group may carry options of the step, as wrappers of optimizers have it; but these are one
        for all groups.
        """
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        try:
            if index == 0:  # what the first of them carries counts, unless it has been set
                carried = carried_by(self.param_groups)
                unset = carried.keys() - self.__dict__.keys()
                Option.set_all(self, {name: carried[name] for name in unset})
            self._check_group(self.param_groups[index], index)
        except BaseException:
            self.param_groups.pop()
            raise

    # Whoever asks for the state may change it, by hand and in any way, so the next step has to
    # look at all of it again; while nobody asks, it need not (csrc/stepper.h).
    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The optimizer's state: for each parameter, a dict of its tensors."""
        self._forget_state()
        state: defaultdict[Tensor, Any] = self.__dict__["state"]
        return state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self._forget_state()
        self.__dict__["state"] = value

    def _forget_state(self) -> None:
        if self.__dict__.pop("_state_seen", None) is not None:
            stepper = self.__dict__.get("_stepper")
            if stepper is not None:
                stepper.forget()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.compiler.disable  # type: ignore[untyped-decorator] # the extension reads raw memory: nothing in here can be traced
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient.

        Everything is checked before anything is written: when a step raises, parameters and
        state are as they were. (Where torch's own implementation has to take some parameters and
        raises half-way, these are as torch left them.)

        Args:
            closure: Reevaluates the model and returns the loss (optional).

        Returns:
            The closure's result, or None.

        Raises:
            RuntimeError: A gradient or state tensor does not fit its parameter (shape, device,
                dtype); the message names the parameter's index and group.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        try:
            if found_inf is not None and not device.on_device(found_inf) and float(found_inf):
                self._skip()
                self._grad_norm = math.nan
            else:
                self._fused_step()
        except BaseException:
            if found_inf is not None:  # a scaler deletes these only after a step that returns
                self.__dict__.pop("found_inf", None)
                self.__dict__.pop("grad_scale", None)
            raise
        return loss

    def _fused_step(self, stream: bool = False) -> None:
        """One step; with ``stream``, a benchmark's stand-in that only moves the same bytes."""
        stepper = self._ready_stepper()
        scale, found_inf = self._scaler()
        threads = torch.get_num_threads()
        window = self._micro_batches > 0
        # A gradient scaler has not seen what was accumulated.
        unseen = window and scale is not None
        policy = "skip" if unseen and self.nonfinite == "propagate" else self.nonfinite

        created: _Created = []
        dropped: _Created = []
        idle = self._idle_averages
        with stepper:
            try:
                if idle:  # the averages would lag behind from now on
                    self._drop_averages(dropped)
                    self._idle_averages = False
                with phase("fusedopt: look"):
                    report = stepper.gather(self.__dict__, False, window, False)
                    fallback = self._create_missing(stepper, created, *report) if report else []
                if window:
                    self._warn_of_lost_clipping(stepper.has_grads())
                if fallback or stepper.has_host() or policy == "raise":
                    # What happens on the CPU needs the scaler's tensors at once, wherever they are.
                    if found_inf is not None and float(found_inf):
                        self._roll_back([*dropped, *created], idle)
                        self._skip()
                        self._grad_norm = math.nan
                        return
                    scale, found_inf = None if scale is None else float(scale), None
                known_scale = scale if isinstance(scale, float) else 1.0
                if fallback:
                    with phase("fusedopt: leave to torch"):
                        self._leave_to_torch(fallback, created, known_scale)

                divisor = self.grad_divisor
                if divisor is None:
                    divisor = self._micro_batches + stepper.has_grads() if window else 1.0
                devices = stepper.devices()
                factors = device.spread(scale, devices), device.spread(found_inf, devices)
                stepper.prepare(known_scale * divisor, *factors, policy != "propagate")
                self._grad_norm = math.nan
                if self.max_grad_norm is not None or policy != "propagate":
                    with phase("fusedopt: norm"):
                        bad = self._measure(stepper, threads, policy)
                    if bad >= 0 and policy != "propagate":
                        self._roll_back([*dropped, *created], idle)
                        self._skip()
                        if policy == "raise":
                            raise RuntimeError(
                                f"{stepper.name_of(bad)}: its gradient holds nan or inf; nothing "
                                "was updated"
                            )
                        return
                # Autograd must know what changes. Told now, while gather() has the tensors in the
                # processor's cache.
                with phase("fusedopt: update"):
                    increment_version(stepper.updated())
                    # Ctrl-C may be met at any line, and behind this one all has happened.
                    stepper.run(threads, stream)
            except BaseException:
                if not stepper.wrote():
                    self._roll_back([*dropped, *created], idle)
                raise

    def _measure(self, stepper: kernels.Stepper, threads: int, policy: str) -> int:
        """Measure the norm, by which the step will clip.

        Returns the number of the first parameter whose gradient is not finite; -1 when there is
        none, or when it is the device's business to skip the step.
        """
        reports = stepper.measure(threads)
        if reports:
            device.combine(reports, self.grad_norm_type)
            stepper.finish_measure()
        norm: float | Tensor
        if stepper.has_host() or not stepper.devices():
            norm, bad = stepper.host_norm()
        else:
            first = stepper.devices()[0]
            report = stepper.reports()[first]
            norm, bad = device.norm(report), -1
            if policy == "raise":
                if kernels.is_capturing(first):
                    raise RuntimeError(
                        "nonfinite='raise' has to wait for the device, which a CUDA graph cannot; "
                        "'skip' need not"
                    )
                bad = device.first_nonfinite(report)
        if self._measures():
            self._grad_norm = norm
        return bad

    def _ready_stepper(self) -> kernels.Stepper:
        if self.__dict__.get("_swapped"):
            raise RuntimeError(
                "no step() or accumulate() within swap_ema(): the weights are not the model's own"
            )
        stepper: kernels.Stepper | None = self.__dict__.get("_stepper")
        if stepper is None:
            stepper = self._stepper = self._new_stepper()
            self._configured = False
        if not self._configured:
            stepper.configure(self._kernel_options())
            self._configured = True
        return stepper

    def _new_stepper(self) -> kernels.Stepper:
        return kernels.Stepper(
            self._family,
            sorted(CARRIED),
            check_carried,
            _unshared,
            device.allocate,
            device.allocate_for,
            device.record,
        )

    def __repr__(self) -> str:
        """torch's, and the options in use, which belong to no group."""
        options = "".join(f"{option}\n" for option in self._used())
        return super().__repr__().removesuffix(")") + f"{options})"

    def _options_changed(self, names: set[str], undo: list[Callable[[], None]]) -> None:
        self._configured = False
        if "param_groups" not in self.__dict__:
            return
        before: _Created = []
        undo.append(partial(self._roll_back, before, self._idle_averages))
        if names & {"weight_precision", "state_dtype"}:
            self._adopt_state(before)
        if "ema_decay" in names:
            if self.ema_decay is None:
                self._drop_averages(before)
            self._idle_averages = False

    def _drop_averages(self, dropped: _Created) -> None:
        """Drop the averages; adds to ``dropped`` what there was before."""
        for param, state in self._states():
            if "ema" in state:
                dropped.append((param, dict(state)))
                del state["ema"]

    def _states(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """All parameters' state; not what someone has put there beside."""
        for param, state in self.state.items():
            if isinstance(param, Tensor) and isinstance(state, dict):
                yield param, state

    def _scaler(self) -> tuple[float | Tensor | None, Tensor | None]:
        """What a gradient scaler says: the factor that the loss had, and whether to skip the step.

        Tensors when they are on a device. Else the factor is a number, or None without a scaler,
        and the step is not to be skipped.
        """
        scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        if scale is None and found_inf is not None:
            if self._micro_batches:
                raise RuntimeError(
                    "unscale_() of the gradient scaler has divided .grad by the scale, but not "
                    "what accumulate() has added up before: leave it away, and clip by "
                    "max_grad_norm"
                )
            scale = 1.0
        if scale is not None and not device.on_device(scale):
            scale = float(scale)
        return scale, found_inf if device.on_device(found_inf) else None

    def _skip(self) -> None:
        kernels.end_window(self.__dict__, 1)

    # Accumulation ---------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def accumulate(self) -> None:
        """Add the gradients to the window's accumulated ones, and set them to None.

        The next :meth:`step` adds the gradients that it finds to these and divides by the number
        of micro-batches: the calls of this method since the last step, plus one if any parameter
        has a gradient then; the same for all parameters, also for those that had no gradient in
        some of them. Or by :attr:`grad_divisor`, when that is set.

        Accumulators are ``state["grad_sum"]``: float32 (float64 for float64 parameters) of the
        parameter's shape, made by the first call and kept from window to window.

        Raises:
            RuntimeError: A gradient does not fit its parameter, or is not one that the kernels
                take (sparse, on another device). Nothing has been changed.
        """
        self._note_callers()
        stepper = self._ready_stepper()
        created: _Created = []
        with stepper:
            try:
                with phase("fusedopt: accumulate"):
                    report = stepper.gather(self.__dict__, False, True, True)
                    while report is not None:
                        missing, fallback = report
                        self._refuse(fallback, "accumulate()")
                        self._create_state(missing, created)
                        report = stepper.gather(self.__dict__, True, True, True)
                    stepper.accumulate(torch.get_num_threads(), self._micro_batches + 1)
            except BaseException:
                if not stepper.wrote():
                    self._roll_back(created)
                raise

    def _drop_window(self) -> None:
        if self._micro_batches:
            kernels.end_window(self.__dict__, 0)

    def _note_callers(self) -> None:
        """Remember where the first window is accumulated, for :meth:`_warn_of_lost_clipping`."""
        if not self.__dict__.get("_looked_for_clipping"):
            self._accumulated_at = {frame.f_code: frame.f_lasti for frame in _callers()}

    def _warn_of_lost_clipping(self, has_grads: bool) -> None:
        """Warn, once, when the caller seems to clip gradients that accumulate() has moved away.

        Nobody hears of the call itself: it finds no gradient, and returns 0. But a loop that clips
        does so between accumulate() and step().
        """
        if self.__dict__.get("_looked_for_clipping"):
            return
        self._looked_for_clipping = True
        accumulated_at = self.__dict__.pop("_accumulated_at", {})
        if not has_grads and (self.max_grad_norm is not None or self.max_grad_value is not None):
            return  # by hand it would find nothing to clip
        for frame in _callers():
            code = frame.f_code
            accumulated = accumulated_at.get(code, frame.f_lasti)
            if accumulated == frame.f_lasti:  # what is between is in a function that is called here
                continue
            name = _clipping_between(code, accumulated, frame.f_lasti)
            if name is not None:
                option = name.removeprefix("clip_grad_").removesuffix("_")
                warnings.warn_explicit(
                    f"{code.co_name}() has a {name}() between accumulate() and step(). If "
                    "it is for the gradients of this optimizer, it does not find those that "
                    "accumulate() has moved away, and the training is not clipped as you expect: "
                    f"give the optimizer max_grad_{option}=... in its place, which clips the mean "
                    "over the window.",
                    UserWarning,
                    code.co_filename,
                    frame.f_lineno,
                )
                return

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, as stock; also those that :meth:`accumulate` has added up."""
        super().zero_grad(set_to_none)
        self._drop_window()

    # What a step tells --------------------------------------------------------------------

    # These are instance attributes when they are not the class's.
    _micro_batches: int = 0  # calls of accumulate() in the window
    _loading: dict[str, Any] | None = None  # the checkpoint that load_state_dict() is at
    _idle_averages: bool = False  # a checkpoint had averages, and ema_decay is None
    _grad_norm: float | Tensor = math.nan  # a tensor: where a device writes it
    _skipped_steps: int = 0  # those that devices have not counted

    @property
    def grad_norm(self) -> Tensor:
        """The norm of all gradients in the last step, before clipping: float64, 0-dim.

        After unscaling and averaging. nan before the first step, and when the last one did not
        measure (neither ``max_grad_norm`` nor ``nonfinite``), or a gradient scaler skipped it. From
        the first step on, it is on the parameters' device; asking for it does not wait for that.
        """
        norm = self._grad_norm
        if isinstance(norm, Tensor):
            return norm.clone()
        reports = self._reports()
        place = reports[0].device if reports else torch.device("cpu")
        return torch.full((), norm, dtype=torch.float64, device=place)

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps were skipped because of gradients of nan or inf: int64, 0-dim.

        By ``nonfinite`` or by a gradient scaler. From the first step on, it is on the parameters'
        device; asking for it does not wait for that.
        """
        counts = [device.skipped(report) for report in self._reports()]
        if not counts:
            return torch.tensor(self._skipped_steps, dtype=torch.int64, device="cpu")
        total = counts[0] + self._skipped_steps
        for more in counts[1:]:
            total += more.to(total.device)
        return total

    def _reports(self) -> list[Tensor]:
        stepper = self.__dict__.get("_stepper")
        return [] if stepper is None else list(stepper.reports().values())

    # The average of the weights ---------------------------------------------------------------

    def swap_ema(self) -> Swap:
        """Within the block, the parameters hold the average of the weights, for evaluation.

        Whatever happens in the block, they are themselves again after it, to the bit, in their own
        memory. A parameter that no step has updated yet keeps its value. Costs a copy of the
        parameters while it lasts.

        Returns:
            A context manager.

        Raises:
            ValueError: An average has another shape than its parameter.
            RuntimeError: No ``ema_decay`` has been set; or one block within another. Or, after all
                else has been given back, a parameter could not be; the message names it.
        """

        def loans() -> list[Loan]:
            if self.ema_decay is None:
                raise RuntimeError("swap_ema() needs an ema_decay; it is None")
            if self.__dict__.get("_swapped"):
                raise RuntimeError("swap_ema() within swap_ema()")
            state = self.__dict__["state"]
            return [
                Loan(f"parameter {index} of group {number}", param, state.get(param, {}).get("ema"))
                for number, group in enumerate(self.param_groups)
                for index, param in enumerate(group["params"])
            ]

        return Swap(self, loans, "swap_ema()")

    # State ------------------------------------------------------------------------------------

    def _create_missing(
        self, stepper: kernels.Stepper, created: _Created, missing: _Missing, fallback: _Fallback
    ) -> _Fallback:
        """Create the missing state. Returns what is torch's to update."""
        while missing:  # more than once when, of what there was, some turns out to be of no use
            self._create_state(missing, created)
            report = stepper.gather(self.__dict__, True, self._micro_batches > 0, False)
            missing, fallback = report if report is not None else ([], [])
        return fallback

    def _leave_to_torch(self, fallback: _Fallback, created: _Created, scale: float) -> None:
        """Have torch update what the kernels do not take."""
        used = [*self._used(), *(["accumulate()"] if self._micro_batches else [])]
        if used:
            self._refuse(fallback, used[0])
        # torch creates its own.
        theirs = {id(self.param_groups[group]["params"][index]) for group, index, _ in fallback}
        self._roll_back([c for c in created if id(c[0]) in theirs])
        created[:] = [c for c in created if id(c[0]) not in theirs]
        self._torch_step(fallback, scale)

    def _refuse(self, fallback: _Fallback, what: str) -> None:
        for group, index, reason in fallback:
            raise RuntimeError(
                f"{self._name_of(group, index)}: {reason}; {what} does not work with that"
            )

    @torch.inference_mode(False)  # where the step is taken does not matter to the next one
    def _create_state(self, missing: _Missing, created: _Created) -> None:
        """Create what is missing; adds to ``created`` what there was before."""
        new = []
        for group_index, index, names in missing:
            group = self.param_groups[group_index]
            param = group["params"][index]
            if device.on_device(param):
                kernels.check_not_capturing(param.device.index)
            before = dict(self.state.get(param, {}))
            entries: dict[str, Any] = {}
            for name in names:
                entries.update(self._new_entries(param, group, before, name))
            new.append((param, before, entries))
        # All tensors before the first entry: when memory runs out, nothing has changed.
        for param, before, entries in new:
            created.append((param, before))
            self.state[param].update(entries)
            for name in HIDDEN:
                if name not in entries and not entries.keys().isdisjoint(HIDDEN):
                    self.state[param].pop(name, None)

    def _new_entries(
        self, param: Tensor, group: dict[str, Any], state: dict[str, Any], name: str
    ) -> dict[str, Tensor]:
        """A new entry of a parameter's state, with what it needs beside it."""
        if name == "step":
            step = state.get(name)
            if isinstance(step, Tensor):
                if step.device != param.device:
                    return {name: counter(step, param.device)}
                # In a dtype that cannot count on. Others may hold it, or share it.
                step.data = wide_counter(step)
                return {name: step}
            # A stock optimizer that does not count has left momentum: that was one step or more.
            names = kernels.family_states(self._family)
            counted = any(state.get(name) is not None for name in names)
            dtype = self._step_dtype(param, group)
            return {name: torch.full((), float(counted), dtype=dtype, device=param.device)}
        if name == "seed":
            seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
            return {name: seed}
        if name == "grad_count":
            return {name: torch.zeros((), dtype=torch.int64, device="cpu")}
        if name == "grad_sum":
            return {name: like(param, wide_dtype(param))}
        if name == "ema":
            return {name: whole_weight(param, state)}
        if name in HIDDEN:
            return {name: hidden_part(param, state, name)}
        square = kernels.family_states(self._family)[name]
        if state.get(name) is not None:  # in 8 bits, and the parameter's memory order has changed
            codes, scale = encode(param, rule_values(state, name, square), square)
            return {name: codes, f"{name}_scale": scale}
        dtype = self._rule_dtype(param) or param.dtype
        if dtype == torch.uint8:
            # All elements start alike, so that one tells the codes: nobody waits for a device.
            one = torch.zeros(1, dtype=param.dtype, device="cpu")
            code, scale = encode(
                one, self._new_state(one, name, torch.float32).nan_to_num_(), square
            )
            codes = like(param, torch.uint8).fill_(int(code))
            scales = scale.to(param.device, non_blocking=True).repeat(blocks_of(param))
            return {name: codes, f"{name}_scale": scales}
        return {name: self._new_state(param, name, dtype)}

    def _recreate_early_state(self) -> None:
        """Replace the state that stock Adagrad's constructor makes in the parameter's dtype."""
        names = kernels.family_states(self._family)
        for group in self.param_groups:
            for param in group["params"]:
                state = self.__dict__["state"].get(param, {})
                if self._rule_dtype(param) is not None and device.has_kernels(param):
                    for name in names & state.keys():
                        state.update(self._new_entries(param, group, {}, name))

    def _rule_dtype(self, param: Tensor) -> torch.dtype | None:
        """What a parameter's rule state is kept in; None: as stock, or as it was loaded."""
        if param.is_complex():
            return wide_dtype(param) if self.state_dtype == torch.float32 else None
        dtype: torch.dtype | None = self.state_dtype
        if dtype is not None:
            return dtype
        if self.weight_precision != "nearest" and param.dtype in HALF:
            return torch.float32
        return None

    def _adopt_state(self, before: _Created) -> dict[tuple[str, str], int]:
        """Bring all state into the form that the options ask for.

        Adds to ``before`` what there was. Returns the entries that were dropped for it and why, and
        of how many parameters.

        Raises:
            ValueError: What there is cannot be this optimizer's state; nothing has changed.
        """
        squares = kernels.family_states(self._family)
        vitals = kernels.family_vitals(self._family)
        found = [
            (param, self.state[param], group_index, index)
            for group_index, group in enumerate(self.param_groups)
            for index, param in enumerate(group["params"])
            if param in self.state and device.has_kernels(param)
        ]
        for param, state, *place in found:
            try:
                check(param, state, squares, vitals)
            except ValueError as error:
                raise ValueError(f"{self._name_of(*place)}: {error}") from None
        dropped: dict[tuple[str, str], int] = {}
        for param, state, *_ in found:
            wanted = self.weight_precision if param.dtype in HALF else None
            hidden = wanted if wanted in HIDDEN else None
            before.append((param, dict(state)))
            for entry in adopt(param, state, squares, self._rule_dtype(param), hidden):
                dropped[entry] = dropped.get(entry, 0) + 1
        return dropped

    def _name_of(self, group: int, index: int) -> str:
        """Names a parameter, for messages."""
        name = self.param_groups[group].get("param_names", {index: None})[index]
        return f"parameter {index} of group {group}{f' ({name})' if name else ''}"

    def _roll_back(self, created: _Created, idle_averages: bool = False) -> None:
        """Undo what has added to ``created``."""
        for param, before in reversed(created):
            state = self.state[param]
            state.clear()
            state.update(before)
            if not state:
                del self.state[param]
        created.clear()
        self._idle_averages = self._idle_averages or idle_averages

    @staticmethod
    def _step_dtype(param: Tensor, group: dict[str, Any]) -> torch.dtype:
        if device.on_device(param):  # where nobody sees a float32 stop at 2^24
            return torch.float64
        # As stock: fused optimizers count in float32, the others in the default dtype.
        default = torch.get_default_dtype()
        return (
            torch.float64 if default == torch.float64 and not group.get("fused") else torch.float32
        )

    def _new_state(self, param: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        return like(param, dtype).zero_()

    def _torch_step(self, fallback: _Fallback, scale: float) -> None:
        """Update some parameters by the stock class's own step."""
        self._warn_of(fallback)
        chosen: dict[int, list[Tensor]] = {}
        for group, index, _ in fallback:
            chosen.setdefault(group, []).append(self.param_groups[group]["params"][index])
        if scale != 1.0:
            for params in chosen.values():
                for param in params:
                    if param.grad is not None:
                        param.grad.div_(scale)
        step = self._stock.step
        while getattr(step, "hooked", False):  # the hooks run once, around our own step
            step = step.__wrapped__  # type: ignore[attr-defined]
        attributes: dict[str, Any] = self.__dict__
        groups: list[dict[str, Any]] = []
        for i, each in enumerate(self.param_groups):
            params = chosen.get(i, [])
            # Neither torch's fused nor its foreach step takes all that is odd where there are
            # kernels, such as parameters that share memory. Elsewhere it is what was asked for.
            odd = any(device.has_kernels(p) for p in params)
            slow = dict.fromkeys({"fused", "foreach"} & each.keys(), False) if odd else {}
            groups.append({**each, "params": params, **slow})
        versions = {p: p._version for ps in chosen.values() for p in ps if p not in self.state}
        names = ("param_groups", "grad_scale", "found_inf")
        saved: dict[str, Any] = {n: attributes[n] for n in names if n in attributes}
        try:
            for name in saved:
                del attributes[name]
            self.param_groups = groups
            step(self)
        except BaseException:
            for param, version in versions.items():  # of the untouched, no state remains
                if param._version == version:
                    self.state.pop(param, None)
            raise
        finally:
            attributes.update(saved)

    def _warn_of(self, fallback: _Fallback) -> None:
        if self.__dict__.get("_warned"):
            return
        reasons = sorted({reason for _, _, reason in fallback})
        warnings.warn(
            f"fusedopt.{type(self).__name__} leaves {len(fallback)} parameter(s) to torch's own, "
            f"slower implementation: {'; '.join(reasons)}.",
            stacklevel=8,  # whoever called step(), past the wrappers around it
        )
        self._warned = True

    # Checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As stock's, and for stock to load: states in 8 bits are given in bfloat16, exactly.

        The options in use, and how many micro-batches a window has, are under the key
        ``"fusedopt"``.
        """
        squares = kernels.family_states(self._family)

        def export_all(_: torch.optim.Optimizer, final: dict[str, Any]) -> None:
            final["state"] = {
                i: export(state, squares)
                if isinstance(i, int) and isinstance(state, dict)
                else state
                for i, state in final["state"].items()
            }
            record = self._in_use()
            if self._micro_batches:
                record[_WINDOW] = self._micro_batches
            if record:
                final[RECORD] = record

        hook = self.register_state_dict_post_hook(export_all, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this or of the stock optimizer, all of it or nothing.

        As stock, except that state saved in a wider dtype than the parameter's keeps it, where
        stock casts it (pytorch issue 43706), unless ``state_dtype`` asks for another one.

        The options of the step become the checkpoint's, but for those that the constructor was
        given or that have been set since: these count. With a ``weight_precision`` other than the
        checkpoint's, the hidden part of the weights is made from the one that was saved; without
        any, from the weights. What the options leave no use for is dropped, with a warning that
        names it.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: The parameter groups do not match; state does not fit its parameter; the
                options do not fit the groups; or it is of another kind of optimizer. Nothing has
                changed.
        """
        if self.__dict__.get("_swapped"):
            raise RuntimeError("no load_state_dict() within swap_ema()")
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"state_dict is not an optimizer's, but no dict: {shown(state_dict)}")
        loaded: dict[str, Any] = {}
        losses: list[str] = []
        before = dict(self.__dict__)
        hooks: list[Any] = []
        try:
            self._loading = loaded
            # The last to see what the user's hooks made of it, and the first after torch.
            hooks.append(self.register_load_state_dict_pre_hook(partial(_remember, loaded)))
            finish = partial(type(self)._finish_load, loaded=loaded, losses=losses)
            hooks.append(self.register_load_state_dict_post_hook(finish, prepend=True))
            super().load_state_dict(state_dict)
            for loss in losses:
                warnings.warn(loss, stacklevel=2)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            self._forget_state()
            raise
        finally:
            self.__dict__.pop("_loading", None)
            for hook in hooks:
                hook.remove()

    def _finish_load(self, loaded: dict[str, Any], losses: list[str]) -> None:
        """Make ours of groups and state that torch has taken over; adds to ``losses`` a text."""
        if self._loading is not loaded:  # this is a hook that a Ctrl-C has left behind
            return
        ids = [i for group in loaded["param_groups"] for i in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for i, param in zip(ids, params, strict=True):
            for name, value in loaded["state"].get(i, {}).items():
                if isinstance(value, Tensor) and (name != "step" or device.has_kernels(param)):
                    place = "cpu" if name in ON_CPU else param.device
                    self.state[param][name] = value.to(place)
        recorded = loaded.get(RECORD, {})
        if not isinstance(recorded, Mapping):
            raise ValueError(f"the checkpoint's {RECORD!r} is not a dict: {shown(recorded)}")
        recorded = dict(recorded)
        micro_batches = count("the checkpoint's micro_batches", recorded.pop(_WINDOW, 0))
        if micro_batches > _MOST_MICRO_BATCHES:
            raise ValueError(
                f"the checkpoint's micro_batches must be at most {_MOST_MICRO_BATCHES}: "
                f"{shown(micro_batches)}"
            )
        unknown = self._load_options(self._options_in(loaded, recorded), micro_batches > 0)
        self._configured = False
        self._check_numbers()
        dropped = self._adopt_state([])
        averages = sum("ema" in state for _, state in self._states())
        self._idle_averages = self.ema_decay is None and averages > 0
        if self._idle_averages:
            dropped["ema", "by the next step, as ema_decay is None"] = averages
        self._micro_batches = micro_batches
        if not micro_batches:  # who does not know of windows, such as stock, may carry an old one
            for _, state in self._states():
                if "grad_count" in state and int(state["grad_count"]) > 0:
                    entry = "grad_sum", "of a window whose micro-batches it does not count"
                    dropped[entry] = dropped.get(entry, 0) + 1
                state.pop("grad_count", None)
                state.pop("grad_sum", None)
        if dropped or unknown:
            entries = [
                f"state[{e!r}] of {n} parameter(s) ({why})" for (e, why), n in dropped.items()
            ]
            losses.append(
                f"The checkpoint has {', '.join(entries + unknown)}. This optimizer, with "
                f"weight_precision={self.weight_precision!r}, drops that."
            )

    def _check_numbers(self) -> None:
        """Raise when the groups have numbers that no step can use."""
        groups = [{**group, "params": []} for group in self.param_groups]
        stepper = self._new_stepper()
        with stepper:
            stepper.gather({**self.__dict__, "param_groups": groups}, False, False, False)

    def _options_in(self, loaded: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
        """The options of the step that a checkpoint was written with."""
        options = carried_by(loaded["param_groups"], "the checkpoint's ")
        # What has copied state and groups alone has left the hidden parts of the weights.
        states = [state for state in loaded["state"].values() if isinstance(state, dict)]
        for name in HIDDEN:
            if any(name in state for state in states):
                options.setdefault("weight_precision", name)
        return {**options, **recorded}

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: also the options and what the last steps told."""
        if self.__dict__.get("_swapped"):
            raise RuntimeError("no copies of the optimizer within swap_ema()")
        own = [*OPTIONS, "_from_checkpoint", "_idle_averages", "_micro_batches"]
        kept = {name: self.__dict__[name] for name in own if name in self.__dict__}
        told = {"_grad_norm": float(self.grad_norm), "_skipped_steps": int(self.skipped_steps)}
        return {**super().__getstate__(), **kept, **told}
