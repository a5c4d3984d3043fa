"""Models as an optimizer sees them: shapes and dtypes, known by name or read from the user's own.

Nothing here loads weights: of a safetensors file only the header is read, a torch checkpoint is
loaded onto the meta device, and a factory is called with the meta device as the default.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import struct
import sys
from collections.abc import Iterator, Mapping
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
    """

    name: str
    shapes: tuple[Shape, ...]
    dtypes: tuple[torch.dtype, ...] | None = None
    group_each: bool = False

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


def _uniform(tensors: int, elements: int, group_each: bool = False) -> Model:
    count = "50M" if elements == 50_000_000 else str(elements)
    name = f"{tensors}x{count}{'-groups' if group_each else ''}"
    return Model(name, tensors * ((elements,),), group_each=group_each)


MODELS = {
    model.name: model
    for model in (
        _uniform(1, 50_000_000),
        Model("gpt2-124m", _gpt2(768, 12)),
        Model("gpt2-1.5b", _gpt2(1600, 48)),
        Model("llama-7b", _llama(4096, 11008, 32)),
        Model("resnet50", _resnet50()),
        _uniform(1000, 64),
        _uniform(1000, 4096),
        _uniform(3000, 3500),  # the case of pytorch issue 3929
        _uniform(10000, 64),
        _uniform(1000, 64, group_each=True),
    )
}


def find(what: str) -> Model:
    """A model by its name in :data:`MODELS`, from a file, or from ``module:factory``.

    Args:
        what: A name; or the path of a ``.safetensors`` file or of a torch checkpoint (a state
            dict, or any nesting of dicts and lists that holds tensors); or ``module:factory``,
            whose factory returns a module, or parameters as an optimizer takes them.

    Raises:
        ModelError: There is no such thing, or it has no tensors of floating-point numbers.
    """
    if what in MODELS:
        return MODELS[what]
    path = Path(what)
    if path.suffix == ".safetensors" or path.exists():
        return from_file(path)
    if ":" in what:
        return from_factory(what)
    raise ModelError(
        f"no model {what!r}: there is no such file, and no such name among {', '.join(MODELS)}; "
        "module:factory calls your own"
    )


def from_file(path: Path | str) -> Model:
    """A model from a ``.safetensors`` file's header or a torch checkpoint.

    Raises:
        ModelError: The file cannot be read, or has no tensors of floating-point numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    read = _safetensors if path.suffix == ".safetensors" else _checkpoint
    return _model(path.name, read(path), f"{path}: has")


def from_factory(what: str) -> Model:
    """A model from ``module:factory``, where the factory needs no arguments.

    Raises:
        ModelError: It cannot be imported or called, or returns nothing that has parameters.
    """
    module, _, name = what.partition(":")
    here = os.getcwd()
    if here not in sys.path:  # as for `python -m`, also when run as a command
        sys.path.insert(0, here)
    try:
        factory = importlib.import_module(module)
        for part in name.split("."):
            factory = getattr(factory, part)
        with torch.device("meta"):
            made: Any = factory()  # type: ignore[operator]
    except Exception as error:
        raise ModelError(f"{what}: {type(error).__name__}: {error}") from error
    if isinstance(made, nn.Module):
        made = list(made.parameters())
    elif not isinstance(made, Mapping | Tensor):
        try:
            made = list(made)
        except TypeError:
            raise ModelError(
                f"{what}: returned {type(made).__name__}, which is no module and no parameters"
            ) from None
    return _model(what, [(t.shape, t.dtype) for t in _tensors(made)], f"{what}: returned")


def _model(name: str, found: list[tuple[Shape, torch.dtype]], what: str) -> Model:
    # Buffers such as counters are not an optimizer's business.
    found = [(tuple(shape), dtype) for shape, dtype in found if _is_trained(dtype)]
    if not found:
        raise ModelError(f"{what} no tensors of floating-point numbers")
    return Model(name, tuple(s for s, _ in found), tuple(d for _, d in found))


def _is_trained(dtype: torch.dtype) -> bool:
    return dtype.is_complex or (dtype.is_floating_point and dtype.itemsize > 1)


def _tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors in a nesting of dicts and sequences; each once."""
    seen: set[int] = set()

    def walk(node: Any) -> Iterator[Tensor]:
        if isinstance(node, Tensor):
            if id(node) not in seen:
                seen.add(id(node))
                yield node
        elif isinstance(node, Mapping):
            for value in node.values():
                yield from walk(value)
        elif isinstance(node, list | tuple):
            for value in node:
                yield from walk(value)

    return walk(tree)


def not_a_checkpoint(path: Path, error: Exception) -> ModelError:
    """What to raise when ``torch.load`` has failed."""
    reason = str(error).strip().partition("\n")[0].partition(". ")[0]  # it goes on with advice
    return ModelError(f"{path}: not a torch checkpoint of tensors ({reason})")


def _checkpoint(path: Path) -> list[tuple[Shape, torch.dtype]]:
    try:
        tree = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:
        raise not_a_checkpoint(path, error) from error
    # With its optimizer, a checkpoint has each parameter's shape more than once.
    if isinstance(tree, Mapping):
        for key in ("model", "state_dict", "model_state_dict", "module"):
            if isinstance(tree.get(key), Mapping):
                tree = tree[key]
                break
    return [(tuple(t.shape), t.dtype) for t in _tensors(tree)]


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
    except (OSError, struct.error, ValueError, AttributeError) as error:
        raise ModelError(f"{path}: not a safetensors file ({error})") from error


def _safetensors(path: Path) -> list[tuple[Shape, torch.dtype]]:
    header, _ = safetensors_header(path)
    try:
        return [
            (tuple(entry["shape"]), SAFETENSORS.get(entry["dtype"], torch.int8))
            for entry in header.values()
        ]
    except (KeyError, TypeError) as error:
        raise ModelError(f"{path}: not a safetensors file ({error})") from error
