"""Several models as one: the mean of their checkpoints, or of what they predict."""

from __future__ import annotations

import itertools
import math
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.utils import _pytree as pytree

from fusedopt.arguments import not_negative, torch_module
from fusedopt.extension import kernels
from fusedopt.models import SAFETENSORS, ModelError, not_a_checkpoint, safetensors_header
from fusedopt.state import wide_dtype


def has_mean(tensor: Tensor) -> bool:
    """Whether a mean of such numbers makes sense; counters and masks are copied."""
    return tensor.is_floating_point() or tensor.is_complex()


def _several(name: str, values: Any) -> list[Any]:
    single = (str, os.PathLike, Mapping, nn.Sequential)  # of which some could be iterated over
    if isinstance(values, single) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is a single {type(values).__name__}, not a sequence")
    listed = list(values)
    if not listed:
        raise ValueError(f"{name} is empty")
    return listed


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """The weight of each in the running mean of it and those before; 1 for the first that has any.

    A mean of equal values is that value, then, to the bit.
    """
    if weights is None:
        return [1 / (i + 1) for i in range(count)]
    listed = _several("weights", weights)
    numbers = [not_negative(f"weights[{i}]", weight) for i, weight in enumerate(listed)]
    if len(numbers) != count:
        raise ValueError(f"weights has {len(numbers)} elements for {count} to average")
    totals = list(itertools.accumulate(numbers))
    if not 0 < totals[-1] < math.inf:
        raise ValueError(f"weights must have a sum that is positive and finite: {numbers}")
    return [n / total if n else 0.0 for n, total in zip(numbers, totals, strict=True)]


def interpolate(means: list[Tensor], values: list[Tensor], weight: float) -> None:
    """Do ``mean += weight (value - mean)``, where the values may be narrower, or elsewhere.

    An infinity stays what it is: the mean with a number, or with an equal one, is infinite, and the
    mean of both infinities is nan. Waits for no device but the CPU. One call writes all means and
    counts up their versions, so that no interrupt comes between.

    Args:
        means: Not in less than float32. When the weight is 1, there may be anything in them.
        values: Of the same shapes.
        weight: Above 0; 1 copies.
    """
    if weight == 1:
        torch._foreach_copy_(means, values)
        return
    # This form has each value as its fixed point. decay * mean + (1 - decay) * value has not, for
    # the two rounded factors do not add up to 1: with a decay of 0.999 it drifts 1e-5 away.
    threads = torch.get_num_threads()
    if kernels.average(means, values, weight, threads, lambda: increment_version(means)):
        return
    wide = [value.to(mean) for mean, value in zip(means, values, strict=True)]
    # torch's lerp goes from the nearer end: mean + weight (value - mean), or, when the weight is at
    # least 0.5, value - (1 - weight) (value - mean). It is right as long as that end is finite.
    # (The other one also counts when numbers are complex, or the weight is 0 in float32.)
    both = means[0].is_complex() or weight < 2.0**-126
    from_mean, from_value = weight < 0.5 or both, weight >= 0.5 or both
    # On a device one would have to wait for an answer to whether it is. So: without infinities, and
    # then these are added again; or rather subtracted, for -0.0 - 0.0 is -0.0.
    outside = []
    if from_mean:
        mixed = _without_infinities(means)
        outside.append(torch._foreach_sub(_real(mixed), _real(means)))
    else:
        mixed = [mean.clone() for mean in means]
    if from_value:
        near = _without_infinities(wide)
        outside.append(torch._foreach_sub(_real(near), _real(wide)))
        wide = near
    torch._foreach_lerp_(mixed, wide, weight)
    for part in outside:
        torch._foreach_sub_(_real(mixed), part)
    torch._foreach_copy_(means, mixed)


def _without_infinities(tensors: list[Tensor]) -> list[Tensor]:
    """Copies with 0 in their place."""
    return [tensor.nan_to_num(math.nan, 0.0, 0.0) for tensor in tensors]


def _real(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]


@torch.no_grad()
def average_checkpoints(
    checkpoints: Sequence[str | os.PathLike[str] | Mapping[str, Any]],
    *,
    weights: Sequence[float] | None = None,
    key: str | Sequence[str] | None = None,
) -> dict[str, Any]:
    """The mean of several checkpoints of one model, such as the last ones of a run.

    One after the other is read: in memory are one file's tensors and the mean, which is kept in
    float32 (float64 for float64, complex alike). The result has the dtypes of the last checkpoint,
    and what cannot be averaged from it: integers, masks, what is no tensor.

    "Model soups": Wortsman et al. 2022, of models that were fine-tuned from the same weights.

    Args:
        checkpoints: Files (``torch.save``'s, loaded with ``weights_only=True``; and
            ``.safetensors``, which needs no package) or state dicts; mixed if need be.
        weights: One per checkpoint, not negative; only their ratios count. None: equal ones. What
            has 0 is checked, and left out of the mean.
        key: Where in each the state dict is: ``"model"``, or ``("state", "model")`` for a dict
            within a dict. None: it is the whole.

    Returns:
        A state dict of new tensors; on the CPU, or where the first state dict's are.

    Raises:
        OSError: A file cannot be opened.
        TypeError: An argument is of another type.
        ValueError: The weights are no weights; a file is no checkpoint; or names, shapes or kinds
            of numbers differ. The message has the file (or the position) and the entry.
    """
    sources = _several("checkpoints", checkpoints)
    for number, source in enumerate(sources):
        if not isinstance(source, str | os.PathLike | Mapping):
            raise TypeError(f"checkpoints[{number}] is no path and no dict: {source!r}")
    shares = _shares(weights, len(sources))
    means: dict[str, Tensor] = {}
    entries: Mapping[str, Any] = {}
    for number, (source, share) in enumerate(zip(sources, shares, strict=True)):
        entries = {}  # lets go of the last file
        where = f"checkpoints[{number}]" if isinstance(source, Mapping) else os.fspath(source)
        entries = _state_dict(source, key, where)
        if number == 0:
            first = {name: _kind(value) for name, value in entries.items()}
            for name, value in entries.items():
                if isinstance(value, Tensor) and has_mean(value):
                    # At once, as torch cannot promote 8-bit floats to anything.
                    means[name] = torch.empty_like(value, dtype=wide_dtype(value))
        _check_kinds(first, {name: _kind(value) for name, value in entries.items()}, where)
        for name, mean in means.items():
            # A later one may need it wider than the first.
            wide = torch.promote_types(mean.dtype, wide_dtype(entries[name]))
            means[name] = mean = mean.to(wide)
            if share > 0:
                interpolate([mean], [entries[name]], share)
    result: dict[str, Any] = {}
    for name, value in entries.items():
        if name in means:
            result[name] = means.pop(name).to(value.dtype)
        else:
            result[name] = value.clone() if isinstance(value, Tensor) else value
    return result


def _kind(value: Any) -> tuple[str, tuple[int, ...]]:
    """What has to be the same in all checkpoints."""
    if not isinstance(value, Tensor):
        return "no tensor", ()
    if value.is_complex():
        return "complex", tuple(value.shape)
    return "real" if value.is_floating_point() else "integer", tuple(value.shape)


def _check_kinds(first: Mapping[str, Any], other: Mapping[str, Any], where: str) -> None:
    for name in (*first, *other):
        if name not in other:
            raise ValueError(f"{where}: has no {name!r}, which the first checkpoint has")
        if name not in first:
            raise ValueError(f"{where}: has {name!r}, which the first checkpoint has not")
        if other[name] != first[name]:
            (kind, shape), (first_kind, first_shape) = other[name], first[name]
            raise ValueError(
                f"{where}: {name!r} is {kind}, of shape {shape}; "
                f"in the first checkpoint {first_kind}, of shape {first_shape}"
            )


def _state_dict(source: Any, key: str | Sequence[str] | None, where: str) -> Mapping[str, Any]:
    found = source if isinstance(source, Mapping) else _load(Path(source))
    for part in [] if key is None else [key] if isinstance(key, str) else key:
        if not isinstance(found, Mapping) or part not in found:
            raise ValueError(f"{where}: has nothing under key {key!r}")
        found = found[part]
    if not isinstance(found, Mapping):
        raise ValueError(f"{where}: has no dict, but {type(found).__name__}; key={key!r}")
    dicts = [name for name, value in found.items() if isinstance(value, Mapping)]
    if not _has_tensors(found) or any(_has_tensors(found[name]) for name in dicts):
        raise ValueError(f"{where}: is no dict of tensors; key={key!r}, and it has dicts: {dicts}")
    return found


def _has_tensors(found: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in found.values())


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        mapped = zipfile.is_zipfile(path)  # torch's format since 1.6
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise
    except Exception as error:
        raise not_a_checkpoint(path, error) from error


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    header, start = safetensors_header(path)
    memory = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    tensors = {}
    for name, entry in header.items():
        try:
            begin, end = entry["data_offsets"]
            # A copy, as a view would have to be aligned, which the format does not promise.
            part = memory[start + begin : start + end].clone()
            tensors[name] = part.view(SAFETENSORS[entry["dtype"]]).view(entry["shape"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ModelError(f"{path}: cannot read {name!r} ({error!r})") from error
    return tensors


@torch.no_grad()
def average_predictions(
    models: Sequence[nn.Module], *inputs: Any, weights: Sequence[float] | None = None, **named: Any
) -> Any:
    """The mean of what several models predict: an ensemble.

    Each model is called in eval mode and without gradients; after that, all their modules are in
    the modes they were in, also when one raises. One prediction is in memory beside the mean.

    What is averaged is what the models return. The mean of logits is another prediction than the
    mean of probabilities; for the latter, have models end in a softmax.

    Args:
        models: Called one after the other.
        *inputs: What to call each with.
        weights: One per model, not negative; only their ratios count. None: equal ones.
        **named: What to call each with, by name.

    Returns:
        A tensor, or the same dicts, tuples and lists of tensors as each model returns, in the
        dtypes of the first model's.

    Raises:
        TypeError: An argument is of another type. Or a prediction has something else than tensors
            of floating-point numbers and None, such as classes.
        ValueError: The weights are no weights; or the models return different structures or shapes.
    """
    modules = [torch_module(f"models[{i}]", m) for i, m in enumerate(_several("models", models))]
    shares = _shares(weights, len(modules))
    modes = {part: part.training for module in modules for part in module.modules()}
    means: list[Tensor | None] = []
    try:
        for number, (module, share) in enumerate(zip(modules, shares, strict=True)):
            leaves, spec = pytree.tree_flatten(module.eval()(*inputs, **named))
            for leaf in leaves:
                if not (leaf is None or (isinstance(leaf, Tensor) and has_mean(leaf))):
                    what = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
                    raise TypeError(f"models[{number}] returns {what}, which has no mean")
            shapes = [None if leaf is None else leaf.shape for leaf in leaves]
            if number == 0:
                first, dtypes = (
                    (spec, shapes),
                    [leaf if leaf is None else leaf.dtype for leaf in leaves],
                )
                means = [
                    None if leaf is None else torch.empty_like(leaf, dtype=wide_dtype(leaf))
                    for leaf in leaves
                ]
            elif (spec, shapes) != first:
                raise ValueError(
                    f"models[{number}] returns another structure or other shapes than models[0]: "
                    f"{shapes} in {spec}; {first[1]} in {first[0]}"
                )
            for mean, leaf in zip(means, leaves, strict=True):
                if mean is not None and share > 0:
                    interpolate([mean], [leaf], share)
    finally:
        for part, mode in modes.items():
            part.training = mode
    results = [m if m is None else m.to(d) for m, d in zip(means, dtypes, strict=True)]
    return pytree.tree_unflatten(results, first[0])
