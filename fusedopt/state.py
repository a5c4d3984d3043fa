"""The forms in which a parameter's state is kept, and the ways between them.

In a parameter's state dict, beside what stock torch has there:

==============  ==========================  =====================================================
``master``      float32, parameter's shape  the whole weight; the parameter is its rounding
``remainder``   int16, parameter's shape    the lower half of the whole weight's bits
``kahan``       int16, parameter's shape    what rounding took from the whole weight, in 1/65536
                                            of the distance between neighbours
``ema``         float32 or float64          the average of the whole weights
``grad_sum``    float32 or float64          the gradients of the window's first micro-batches
``grad_count``  int64, 0-dim                how many micro-batches; 0: ``grad_sum`` means nothing
``seed``        int64, 0-dim                of the random bits for stochastic rounding
``X_scale``     float32, 1-dim              the scales of a state X that is kept in 8 bits
==============  ==========================  =====================================================

All are made by the step that first needs them, on the parameter's device; but ``grad_count`` and
``seed`` are always on the CPU, and ``step`` always on the device, where stock has it only if fused
or capturable. The arithmetic is the extension's (``csrc/store.h``
and ``csrc/quantize.h``).
"""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fusedopt.arguments import shown
from fusedopt.extension import kernels

HIDDEN = ("master", "remainder", "kahan")
ON_CPU = ("seed", "grad_count")
HALF = (torch.bfloat16, torch.float16)
_HIDDEN_DTYPES = {"master": torch.float32, "remainder": torch.int16, "kahan": torch.int16}
_WIDE = {
    torch.float64: torch.float64,
    torch.complex128: torch.complex128,
    torch.complex64: torch.complex64,
    torch.complex32: torch.complex64,
}


def wide_dtype(param: Tensor) -> torch.dtype:
    """The type that a parameter's arithmetic is done in."""
    return _WIDE.get(param.dtype, torch.float32)


def like(param: Tensor, dtype: torch.dtype) -> Tensor:
    """A new tensor of a parameter's shape, dense, in the parameter's memory order."""
    return torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)


# The extension converts on the CPU, also what comes from a device: that happens seldom.
def _rows(tensor: Tensor) -> Tensor:
    """A tensor's elements, on the CPU."""
    return tensor.detach().contiguous().view(-1).cpu()


def _memory(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order in which they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _is_dense(value: Any) -> TypeGuard[Tensor]:
    """Whether something is a tensor, and not a sparse one."""
    return isinstance(value, Tensor) and value.layout == torch.strided


def _is_plain(tensor: Tensor) -> bool:
    """Whether all elements are in memory as they are, without gaps, and each of them once."""
    dense: bool = torch.ops.aten.is_non_overlapping_and_dense(tensor)
    return dense and not tensor.is_neg() and not tensor.is_conj()


def _check_shape(param: Tensor, value: Tensor, name: str) -> None:
    if value.shape != param.shape:
        raise ValueError(
            f"state[{name!r}] has the shape {tuple(value.shape)}, "
            f"its parameter {tuple(param.shape)}"
        )


def wide_counter(step: Tensor) -> Tensor:
    """A counter in float64, from one of any dtype."""
    if step.is_complex() or step.numel() != 1:
        raise ValueError(f"state['step'] is not a number: {shown(step)}")
    return step.double()


def counter(step: Tensor, device: torch.device) -> Tensor:
    """A counter as it is kept on a device: float64, or on the CPU as stock has it in float32."""
    kept = device.type == "cpu" and step.dtype in (torch.float32, torch.float64)
    # CUDA reads host memory that is not pinned before such a copy returns.
    return (step if kept else wide_counter(step)).to(device, non_blocking=device.type != "cpu")


def check(
    param: Tensor, state: dict[str, Any], squares: dict[str, bool], vitals: list[str]
) -> None:
    """ValueError when a loaded state cannot be that of a parameter.

    Args:
        param: The parameter.
        state: Its state.
        squares: The rule's states, and whether they are squares.
        vitals: What the rule has all of, or none.
    """
    lacking = [name for name in vitals if state.get(name) is None]
    if 0 < len(lacking) < len(vitals):
        raise ValueError(f"its state lacks {lacking[0]!r}, but has others of this rule's")
    if ("grad_count" in state) != ("grad_sum" in state):
        raise ValueError("its state has one of 'grad_sum' and 'grad_count', but not the other")
    for name in (*squares, *HIDDEN, "ema", "grad_sum"):
        value = state.get(name)
        if name not in state or (value is None and name in squares):  # as stock's SGD leaves it
            continue
        if not _is_dense(value):
            raise ValueError(f"state[{name!r}] is not a dense tensor: {shown(value)}")
        _check_shape(param, value, name)
        if value.is_floating_point() and value.element_size() == 1:
            raise ValueError(f"state[{name!r}] is in {value.dtype}, which cannot be computed with")
        if name not in ("remainder", "kahan") and value.is_complex() != param.is_complex():
            raise ValueError(f"state[{name!r}] and its parameter are not both complex")
    for name in squares:
        value, scale = state.get(name), state.get(f"{name}_scale")
        if value is None or value.dtype != torch.uint8:
            continue
        if not _is_dense(scale) or scale.numel() != blocks_of(param) or scale.is_complex():
            raise ValueError(
                f"state['{name}_scale'] must be a dense tensor with a number for each "
                f"{kernels.BLOCK} elements of state[{name!r}]: {shown(scale)}"
            )
    for name in ("step", *ON_CPU):
        value = state.get(name)
        if name not in state or (value is None and name == "step"):
            continue
        if not _is_dense(value) or value.numel() != 1 or value.is_complex():
            raise ValueError(f"state[{name!r}] is not a tensor of one number: {shown(value)}")
        if not 0 <= float(value) < math.inf:
            raise ValueError(f"state[{name!r}] is not a count: {shown(value)}")


@torch.no_grad()
def whole_weight(param: Tensor, state: dict[str, Any]) -> Tensor:
    """A parameter's weight in full precision, from whichever hidden part its state has."""
    whole = like(param, wide_dtype(param)).copy_(param.detach())
    if param.dtype not in HALF:
        return whole
    for name in HIDDEN:
        hidden = state.get(name)
        if hidden is not None:
            _check_shape(param, hidden, name)
            values = torch.empty(param.numel(), dtype=torch.float32, device="cpu")
            kernels.join_weights(
                _rows(param),
                _rows(hidden).clone(),
                kernels.WeightPrecision.__members__[name],
                values,
                param.numel(),
            )
            return whole.copy_(values.view(param.shape))
    return whole


@torch.no_grad()
def hidden_part(param: Tensor, state: dict[str, Any], name: str) -> Tensor:
    """The hidden part of a name in ``HIDDEN``, from whichever one the state has."""
    if state.keys().isdisjoint(HIDDEN):  # the parameter is all there is
        if name == "master":
            return whole_weight(param, state)
        return like(param, _HIDDEN_DTYPES[name]).zero_()
    hidden = torch.empty(param.numel(), dtype=_HIDDEN_DTYPES[name], device="cpu")
    kernels.split_weights(
        _rows(param).clone(),
        hidden,
        kernels.WeightPrecision.__members__[name],
        _rows(whole_weight(param, state)),
        param.numel(),
    )
    return like(param, hidden.dtype).copy_(hidden.view(param.shape))


def decode(codes: Tensor, scale: Tensor, square: bool, dtype: torch.dtype) -> Tensor:
    """A state's values from their 8-bit codes; exact in bfloat16."""
    values = torch.empty(codes.numel(), dtype=torch.float32, device="cpu")
    kernels.decode_state(_memory(codes).cpu(), scale.cpu(), square, values, codes.numel())
    decoded = like(codes, dtype)
    _memory(decoded).copy_(values)
    return decoded


def blocks_of(param: Tensor) -> int:
    """How many scales a state in 8 bits has."""
    blocks: int = -(-param.numel() // kernels.BLOCK)
    return blocks


def encode(param: Tensor, values: Tensor, square: bool) -> tuple[Tensor, Tensor]:
    """8-bit codes and their scales of a state's values, rounded to the nearest."""
    ordered = _memory(like(param, torch.float32).copy_(values)).cpu()
    codes = torch.empty(param.numel(), dtype=torch.uint8, device="cpu")
    scale = torch.empty(blocks_of(param), dtype=torch.float32, device="cpu")
    kernels.encode_state(codes, scale, square, ordered, codes.numel())
    encoded = like(param, torch.uint8)
    _memory(encoded).copy_(codes)
    return encoded, scale.to(param.device)


def rule_values(state: dict[str, Any], name: str, square: bool) -> Tensor:
    """A rule's state as floating-point numbers, in whatever form it is kept."""
    value: Tensor = state[name]
    if value.dtype == torch.uint8:
        return decode(value, state[f"{name}_scale"], square, torch.bfloat16)
    return value


def export(state: dict[str, Any], squares: dict[str, bool]) -> dict[str, Any]:
    """A parameter's state as a checkpoint holds it: plain tensors, for any optimizer to load.

    States in 8 bits become bfloat16, which holds their values exactly; an accumulator that holds
    nothing is left out.
    """
    exported = dict(state)
    for name, square in squares.items():
        if f"{name}_scale" in state:
            exported[name] = rule_values(state, name, square)
            del exported[f"{name}_scale"]
    if "grad_count" in state and not int(state["grad_count"]):
        exported.pop("grad_sum", None)
        del exported["grad_count"]
    return exported


def adopt(
    param: Tensor,
    state: dict[str, Any],
    squares: dict[str, bool],
    dtype: torch.dtype | None,
    hidden: str | None,
) -> list[tuple[str, str]]:
    """Bring a state that :func:`check` has passed into the form that an optimizer keeps, in place.

    Args:
        param: The parameter.
        state: Its state.
        squares: The rule's states, and whether they are squares.
        dtype: What the rule's states shall be kept in; None: as they are, but not in less than
            the parameter's own.
        hidden: The hidden part that the weight shall have, or None. When the state has another
            one instead, that one stays: the next step, when also the weight has been loaded for
            sure, makes this one from it.

    Returns:
        The entries that were dropped, because no other has what they told, and why.
    """
    dropped = []
    for name in (*squares, *HIDDEN, "ema", "grad_sum"):
        value = state.get(name)
        if isinstance(value, Tensor) and not _is_plain(value):
            state[name] = like(param, value.dtype).copy_(value.detach())
    for name, square in squares.items():
        value = state.get(name)
        coded = isinstance(value, Tensor) and value.dtype == torch.uint8
        if not coded:
            state.pop(f"{name}_scale", None)
        if not isinstance(value, Tensor):
            continue
        if coded:
            scale = state[f"{name}_scale"].detach().resolve_neg().reshape(-1)
            state[f"{name}_scale"] = scale.contiguous().to(torch.float32)
        if dtype == torch.uint8:
            if not coded:
                state[name], state[f"{name}_scale"] = encode(param, value, square)
            continue
        if coded:
            value = rule_values(state, name, square)
            state.pop(f"{name}_scale")
        kept = dtype or torch.promote_types(value.dtype, param.dtype)
        if coded or value.dtype != kept:
            state[name] = value.to(kept)
    for name in ("master", "ema", "grad_sum"):
        if isinstance(state.get(name), Tensor):
            state[name] = state[name].to(wide_dtype(param))
    present = [name for name in HIDDEN if name in state]
    if hidden is None or hidden in present:
        for name in present:
            if name != hidden:
                del state[name]
                if hidden is None:
                    dropped.append((name, f"of no use to weights in {param.dtype} here"))
    # Another library may have cast what is no floating-point number. Bits cannot be had
    # back; numbers can.
    for name in ("remainder", "kahan"):
        if isinstance(state.get(name), Tensor) and state[name].dtype != torch.int16:
            del state[name]
            dropped.append((name, "no longer int16, so its bits are lost"))
    for name in ON_CPU:
        if isinstance(state.get(name), Tensor):
            state[name] = state[name].to("cpu", torch.int64)
    if isinstance(state.get("step"), Tensor):
        state["step"] = counter(state["step"], param.device)
    return dropped
