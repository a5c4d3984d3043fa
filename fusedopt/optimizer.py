"""What all fused optimizers share: the step, and loading checkpoints.

This is the only module that imports the extension.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(f"fusedopt needs torch 2.10 or later; this is torch {torch.__version__}.")

from torch.autograd.graph import increment_version

try:
    # After torch, so that the extension shares torch's OpenMP threads.
    import fusedopt._C as _C
except ImportError as error:
    raise ImportError(
        f"fusedopt's compiled extension cannot be loaded ({error}). In a checkout, build it with "
        "`pip install -e .`; elsewhere, reinstall fusedopt."
    ) from error

_C.bind_torch(torch.Tensor, torch.nn.Parameter)
ISA = _C.cpu_isa()

# (group, index within the group, what) of one parameter.
_Missing = list[tuple[int, int, list[str]]]
_Fallback = list[tuple[int, int, str]]


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


class FusedOptimizer(torch.optim.Optimizer):
    """The fused step, to be mixed into a stock optimizer class before that class.

    A subclass names its rule family (``csrc/rules.h``) and the stock class it replaces.
    """

    _family: ClassVar[str]
    _stock: ClassVar[type[torch.optim.Optimizer]]

    # A GradScaler hands such an optimizer its scale and its verdict, instead of rewriting the
    # gradients before the step: the division happens in the kernel.
    _step_supports_amp_scaling = True

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
        if found_inf is None or not found_inf.item():
            self._fused_step()
        return loss

    def _fused_step(self, stream: bool = False) -> None:
        """One step; with ``stream``, a benchmark's stand-in that only moves the same bytes."""
        stepper: _C.Stepper | None = self.__dict__.get("_stepper")
        if stepper is None:
            stepper = self._stepper = _C.Stepper(self._family, _unshared)
        grad_scale = getattr(self, "grad_scale", None)
        scale = 1.0 if grad_scale is None else float(grad_scale)

        stepper.begin()
        try:
            report = stepper.gather(self.__dict__, False, scale)
            if report is not None:
                self._prepare(stepper, *report, scale)
            # Autograd must know what changes. Told now, while gather() has the tensors in the
            # processor's cache.
            increment_version(stepper.updated())
            stepper.run(torch.get_num_threads(), stream)
        finally:
            stepper.end()

    def _prepare(
        self, stepper: _C.Stepper, missing: _Missing, fallback: _Fallback, scale: float
    ) -> None:
        """Create the missing state and have torch update what the kernels do not take."""
        created = self._create_state(missing)
        try:
            if created:
                report = stepper.gather(self.__dict__, True, scale)
                fallback = report[1] if report is not None else []
            for group, index, _ in fallback:  # torch creates its own
                self._discard_state(group, index, created.pop((group, index), []))
            if fallback:
                self._torch_step(fallback, scale)
        except BaseException:
            for (group, index), names in created.items():
                self._discard_state(group, index, names)
            raise

    def _create_state(self, missing: _Missing) -> dict[tuple[int, int], list[str]]:
        """Create what is missing in ``self.state``; returns what was, by parameter."""
        new = [
            (self.param_groups[group]["params"][index], self.param_groups[group], name)
            for group, index, names in missing
            for name in names
        ]
        # All tensors before the first entry: when memory runs out, nothing has changed.
        tensors = [
            torch.zeros((), dtype=self._step_dtype(group), device="cpu")
            if name == "step"
            else self._new_state(param, name)
            for param, group, name in new
        ]
        for (param, _, name), tensor in zip(new, tensors, strict=True):
            self.state[param][name] = tensor
        return {(group, index): names for group, index, names in missing}

    @staticmethod
    def _step_dtype(group: dict[str, Any]) -> torch.dtype:
        # As stock: fused optimizers count in float32, the others in the default dtype.
        default = torch.get_default_dtype()
        return (
            torch.float64 if default == torch.float64 and not group.get("fused") else torch.float32
        )

    def _new_state(self, param: Tensor, name: str) -> Tensor:
        return torch.zeros_like(param, memory_format=torch.preserve_format)

    def _discard_state(self, group: int, index: int, names: list[str]) -> None:
        param = self.param_groups[group]["params"][index]
        for name in names:
            self.state[param].pop(name, None)
        if not self.state[param]:
            del self.state[param]

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
        names = ("param_groups", "grad_scale", "found_inf")
        saved = {name: attributes.pop(name) for name in names if name in attributes}
        self.param_groups = [
            {**group, "params": chosen.get(i, []), **({"fused": False} if "fused" in group else {})}
            for i, group in enumerate(saved["param_groups"])
        ]
        versions = {p: p._version for ps in chosen.values() for p in ps if p not in self.state}
        try:
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this or of the stock optimizer.

        As stock, except that state tensors keep the dtype they were saved in, where stock casts
        them to the parameter's (pytorch issue 43706).

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: The parameter groups do not match.
        """
        loaded: dict[str, Any] = {}

        def remember(_: torch.optim.Optimizer, final: dict[str, Any]) -> None:
            loaded.update(final)  # registered last: sees what the user's hooks made of it

        def restore_dtypes(_: torch.optim.Optimizer) -> None:
            ids = [i for group in loaded["param_groups"] for i in group["params"]]
            params = [param for group in self.param_groups for param in group["params"]]
            for i, param in zip(ids, params, strict=True):
                for name, value in loaded["state"].get(i, {}).items():
                    if name != "step" and isinstance(value, Tensor) and value.is_floating_point():
                        self.state[param][name] = value.to(param.device)

        hooks = [
            self.register_load_state_dict_pre_hook(remember),
            self.register_load_state_dict_post_hook(restore_dtypes, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()


def build_info() -> dict[str, str]:
    """What ``python -m fusedopt info`` prints about the extension."""
    threads = torch.get_num_threads()
    return {
        "instruction set": f"{ISA} (of: {_C.cpu_isas()})",
        "threads": str(threads) if _C.cpu_has_threads() else "1 (built without OpenMP)",
        "CUDA": "no (this release has CPU kernels only)",
    }
