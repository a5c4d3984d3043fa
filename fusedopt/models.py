"""Models as an optimizer sees them: shapes and dtypes, known by name or read from the user's own.

Nothing here reads weights: of a safetensors file only the header is read, a torch checkpoint is
mapped into memory (but one from before torch 1.6, which is read), and a factory is called with the
meta device as the default.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import struct
import sys
import traceback
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


class ModelError(ValueError):
    """A model cannot be had; the message says which, and why."""


@dataclass(frozen=True)
class Model:
    """The parameters of a model.

    Attributes:
        name: What reports call it.
        shapes: One per parameter.
        dtypes: One per parameter; None: whatever one wants to try.
        group_each: A parameter group for each parameter, instead of one for all.
        left_out: What else there was, in words; empty when that is nothing.
    """

    name: str
    shapes: tuple[Shape, ...]
    dtypes: tuple[torch.dtype, ...] | None = None
    group_each: bool = False
    left_out: str = ""

    @property
    def elements(self) -> int:
        """Elements of all parameters together."""
        return sum(math.prod(shape) for shape in self.shapes)


def _gpt2(width: int, layers: int) -> tuple[Shape, ...]:
    """GPT-2; as in the original, linear weights are (in, out) and the head is tied."""
    norm: tuple[Shape, ...] = ((width,), (width,))

    def linear(inputs: int, outputs: int) -> tuple[Shape, ...]:
        return (inputs, outputs), (outputs,)

    attention = linear(width, 3 * width) + linear(width, width)
    mlp = linear(width, 4 * width) + linear(4 * width, width)
    embeddings = ((50257, width), (1024, width))
    return embeddings + layers * (norm + attention + norm + mlp) + norm


def _llama(width: int, hidden: int, layers: int) -> tuple[Shape, ...]:
    """LLaMA, with its vocabulary of 32000 and a head of its own."""
    attention = 4 * ((width, width),)
    mlp = ((hidden, width), (hidden, width), (width, hidden))
    layer = (*attention, *mlp, (width,), (width,))
    return ((32000, width), *layers * layer, (width,), (32000, width))


def _resnet50() -> tuple[Shape, ...]:
    """ResNet-50 (v1.5, as torchvision's) for 1000 classes."""

    def conv(inputs: int, outputs: int, size: int) -> tuple[Shape, ...]:
        return (outputs, inputs, size, size), (outputs,), (outputs,)  # and its batch norm

    shapes = conv(3, 64, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += conv(channels, width, 1) + conv(width, width, 3) + conv(width, 4 * width, 1)
            if block == 0:
                shapes += conv(channels, 4 * width, 1)
            channels = 4 * width
    return (*shapes, (1000, channels), (1000,))


_UNIFORM = re.compile(r"([1-9]\d*)x([1-9]\d*)([kMB]?)(-groups)?", re.ASCII)
_SUFFIXES = {"": 1, "k": 1_000, "M": 1_000_000, "B": 1_000_000_000}


def _uniform(name: str) -> Model:
    """Tensors of one size: "1000x4096" or "1x50M", and "1000x64-groups" with a group for each."""
    match = _UNIFORM.fullmatch(name)
    assert match is not None
    tensors, elements, suffix, groups = match.groups()
    shape = (int(elements) * _SUFFIXES[suffix],)
    return Model(name, int(tensors) * (shape,), group_each=groups is not None)


MODELS = {
    model.name: model
    for model in (
        _uniform("1x50M"),
        Model("gpt2-124m", _gpt2(768, 12)),
        Model("gpt2-1.5b", _gpt2(1600, 48)),
        Model("llama-7b", _llama(4096, 11008, 32)),
        Model("resnet50", _resnet50()),
        _uniform("1000x64"),
        _uniform("1000x4096"),
        _uniform("3000x3500"),  # the case of pytorch issue 3929
        _uniform("10000x64"),
        _uniform("1000x64-groups"),
    )
}


def find(what: str) -> Model:
    """A model by its name, from a file, or from ``module:factory``.

    Args:
        what: A name in :data:`MODELS`; or one such as "1000x4096", "1x50M" or "1000x64-groups",
            for any number of tensors and of elements in each (k, M and B are thousands, millions
            and billions), in one group or in one group each; or the path of a ``.safetensors``
            file or of a torch checkpoint (a state dict, or any nesting of dicts and lists that
            holds tensors); or ``module:factory``, whose factory returns a module, or parameters
            as an optimizer takes them.

    Raises:
        ModelError: There is no such thing, or it has no tensors of floating-point numbers.
    """
    if what in MODELS:
        return MODELS[what]
    if _UNIFORM.fullmatch(what) and not os.path.exists(what):
        return _uniform(what)
    if os.path.exists(what) or what.endswith(".safetensors"):  # unlike Path's, takes any text
        return from_file(what)
    if ":" in what:
        return from_factory(what)
    if what.endswith(".py"):
        raise ModelError(f"{what}: no such file; {_program_hint(what)}")
    raise ModelError(
        f"no model {what!r}: there is no such file, and no such name among {', '.join(MODELS)}; "
        "module:factory calls your own"
    )


def from_file(path: Path | str) -> Model:
    """A model from a ``.safetensors`` file's header or a torch checkpoint.

    Raises:
        ModelError: The file cannot be read, or has no tensors of floating-point numbers.
    """
    if not os.path.isfile(path):
        raise ModelError(f"{path}: {'not a file' if os.path.exists(path) else 'no such file'}")
    path = Path(path)
    if path.suffix == ".py":
        raise ModelError(f"{path}: a program; {_program_hint(path.name)}")
    read = _safetensors if path.suffix == ".safetensors" else _checkpoint
    return _model(path.name, read(path), f"{path}: has")


def _program_hint(name: str) -> str:
    return f"{name.removesuffix('.py')}:build calls its function build"


def from_factory(what: str) -> Model:
    """A model from ``module:factory``, where the factory needs no arguments.

    Instead of a factory it may be what a factory returns: a module, or parameters.

    Raises:
        ModelError: It cannot be imported or called, or returns nothing that has parameters.
    """
    module, _, name = what.partition(":")
    here = os.getcwd()
    if here not in sys.path:  # as for `python -m`, also when run as a command
        sys.path.insert(0, here)
    try:
        made: Any = importlib.import_module(module)
        for part in name.split("."):
            made = getattr(made, part)
        if callable(made) and not isinstance(made, nn.Module):
            with torch.device("meta"):
                made = made()
        if isinstance(made, nn.Module):
            made = made.parameters()
        if isinstance(made, Iterable) and not isinstance(made, Mapping | Tensor | str):
            made = list(made)
    except (Exception, SystemExit) as error:  # such as of a program that reads its arguments
        where = _where(error)
        raise ModelError(f"{what}: {type(error).__name__}: {error}{where}") from error
    if not isinstance(made, Mapping | Tensor | list):
        raise ModelError(
            f"{what}: gives {type(made).__name__}, which is no module and no parameters"
        )
    tensors, _ = _tensors(made, what)
    found = [
        (t.shape, t.dtype if t.requires_grad else "frozen (requires_grad=False)") for t in tensors
    ]
    return _model(what, found, f"{what}: gives")


def _where(error: BaseException) -> str:
    """The line of the user's file in which it came up, as far as there is one."""
    not_theirs = (__file__, importlib.__file__)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in not_theirs and not frame.filename.startswith("<")
    ]
    theirs = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""


def _model(name: str, found: Iterable[tuple[Shape, torch.dtype | str]], what: str) -> Model:
    """Of what was found, each with its dtype, or why it takes no part, that which is trained."""
    trained: list[tuple[Shape, torch.dtype]] = []
    others: Counter[str] = Counter()
    for shape, dtype in found:
        if isinstance(dtype, torch.dtype) and _is_trained(dtype):
            trained.append((tuple(shape), dtype))
        else:  # buffers such as counters are not an optimizer's business
            kind = str(dtype).removeprefix("torch.")
            others[kind if kind.startswith("frozen") else f"of {kind}"] += 1
    counts = [f"{count} {kind}" for kind, count in others.items()]
    if counts:
        first, _, kind = counts[0].partition(" ")
        counts[0] = f"{first} tensor{'s' if int(first) > 1 else ''} {kind}"
    left_out = ", ".join(counts)
    if not trained:
        only = f", only {left_out}" if left_out else ""
        raise ModelError(f"{what} no tensors of floating-point numbers to train{only}")
    return Model(name, tuple(s for s, _ in trained), tuple(d for _, d in trained), False, left_out)


def _is_trained(dtype: torch.dtype) -> bool:
    return dtype.is_complex or (dtype.is_floating_point and dtype.itemsize > 1)


def _tensors(tree: Any, what: str) -> tuple[list[Tensor], bool]:
    """The tensors in a nesting of dicts and sequences, but for optimizers' states.

    Each memory counts once, however many names it has. Also returns whether there were optimizers'
    states.
    """
    seen: dict[Any, Any] = {}  # keeps what it has seen, or others might get the same id
    tensors: list[Tensor] = []
    optimizers = False
    ahead = [tree]
    while ahead:
        node = ahead.pop()
        if id(node) in seen:
            continue
        seen[id(node)] = node
        if isinstance(node, Tensor):
            if node.layout != torch.strided:
                kind = str(node.layout).removeprefix("torch.")
                raise ModelError(f"{what}: has a tensor that is not dense ({kind})")
            # The address of the storage itself: a factory's, on the meta device, have no data.
            place = node.untyped_storage()._cdata, node.storage_offset(), node.numel()
            if place not in seen:
                seen[place] = node
                tensors.append(node)
        elif isinstance(node, Mapping):
            if {"state", "param_groups"} <= node.keys():
                optimizers = True
            else:
                ahead.extend(reversed(list(node.values())))
        elif isinstance(node, list | tuple):
            ahead.extend(reversed(node))
    return tensors, optimizers


def not_a_checkpoint(path: Path, error: Exception) -> ModelError:
    """What to raise when ``torch.load`` has failed."""
    return ModelError(f"{path}: not a torch checkpoint of tensors{_why(error)}")


def _checkpoint(path: Path) -> list[tuple[Shape, torch.dtype | str]]:
    try:
        # Mapped, as on the meta device nothing tells which tensors share memory. What torch wrote
        # before it wrote zip files cannot be mapped.
        tree = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:
        raise not_a_checkpoint(path, error) from error
    # Beside the model there may be another, such as an average of it.
    if isinstance(tree, Mapping):
        for key in ("model", "state_dict", "model_state_dict", "module"):
            if isinstance(tree.get(key), Mapping):
                tree = tree[key]
                break
    tensors, optimizers = _tensors(tree, str(path))
    if optimizers and not tensors:
        raise ModelError(f"{path}: holds an optimizer's state, and no model")
    return [(t.shape, t.dtype) for t in tensors]


def _why(error: Exception) -> str:
    """What torch.load's many words come down to."""
    unknown = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
    if unknown:
        return (
            f", as it holds a {unknown[1]}: save model.state_dict(), or use module:factory, which "
            "builds the model"
        )
    if isinstance(error, OSError):
        return f" ({error.strerror})"
    return ""


# The names of safetensors' header (its format: 8 bytes of length, then JSON, then the tensors).
SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def safetensors_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """A ``.safetensors`` file's entries by name, and how many bytes lie before their data.

    Raises:
        ModelError: The file has no such header.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if 8 + length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        return {n: entry for n, entry in header.items() if n != "__metadata__"}, 8 + length
    except (OSError, struct.error, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: not a safetensors file ({error})") from error


def _safetensors(path: Path) -> list[tuple[Shape, torch.dtype | str]]:
    header, _ = safetensors_header(path)
    found: list[tuple[Shape, torch.dtype | str]] = []
    try:
        for name, entry in header.items():
            sizes = entry["shape"]
            if not isinstance(sizes, list) or any(type(n) is not int or n < 0 for n in sizes):
                raise ValueError(f"{name!r} has the shape {sizes!r}")
            found.append((tuple(sizes), SAFETENSORS.get(entry["dtype"], str(entry["dtype"]))))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not a safetensors file ({error})") from error
    return found
