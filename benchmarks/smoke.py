"""Whether steps on a GPU are right, in seconds: ``python benchmarks/smoke.py --device cuda``.

The formats that people train with, each by four rules, plain and clipped, and by AdamW with an
average of the weights, too. A combination is run three times: as usual, on a stream of its own,
and as a graph that is replayed. The first is compared with the same steps on the CPU, and with
torch's on the GPU where torch has them; the other two have to give the same bits as the first.
Before these, divisions and square roots of many numbers, which kernels compute from the GPU's
estimates (csrc/quick.h). Stops at the first mismatch, and says where it is.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import emulated  # noqa: F401
import torch
from torch import Tensor

import fusedopt
from fusedopt.extension import build_info
from fusedopt.recipe import whole

FLOAT32, BF16, UINT8 = torch.float32, torch.bfloat16, torch.uint8
MAX_NORM = 100.0  # the gradients' is some four times as large
REPLAYS = 3
STRAY = 1e-3  # what part of the elements may be rounded to another neighbour, where few bits are


@dataclass(frozen=True)
class Format:
    """How weights and state are kept.

    Attributes:
        dtype: Of parameters and gradients.
        options: Of our optimizers.
        torchs: In which dtype torch's optimizers can do the same; None: in none.
        coarse: Relative and absolute tolerance for the few elements that fall to the other side
            of a rounding; None: there are none such.
    """

    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)
    torchs: torch.dtype | None = None
    coarse: tuple[float, float] | None = None


REMAINDER = {"weight_precision": "remainder"}
FORMATS = {
    "float32": Format(FLOAT32, torchs=FLOAT32),
    "bfloat16 with remainder": Format(BF16, REMAINDER, torchs=FLOAT32),
    "float32, state in 8 bits": Format(FLOAT32, {"state_dtype": UINT8}, coarse=(0.3, 0.2)),
    "bfloat16": Format(BF16, torchs=BF16, coarse=(2e-2, 1e-2)),
    "bfloat16 with master": Format(
        BF16, {"weight_precision": "master"}, torchs=FLOAT32, coarse=(2e-2, 1e-2)
    ),
    "bfloat16 with remainder, state in 8 bits": Format(
        BF16, {**REMAINDER, "state_dtype": UINT8}, coarse=(0.3, 0.2)
    ),
}
RULES: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "SGD": {"lr": 0.01, "momentum": 0.9},
    "RMSprop": {"lr": 0.01},
    "Adagrad": {"lr": 0.1},
}
TIGHT = (1e-5, 1e-6)
LOOSE, COARSE = (1e-3, 1e-4), (2e-2, 1e-2)  # torch's kernels round elsewhere
LARGE = [(4096,), (100_000,), (256, 30), (100_003,), (1,), (17,), (), (33, 7), (1025,), (511, 3)]
UNALIGNED = {3, 8}  # parameters that begin one element after their memory


class MismatchError(Exception):
    """A result is not what it should be; the message says which, and where."""


@dataclass(frozen=True)
class Shapes:
    """Of the parameters."""

    all: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> list[int]:
        """Elements of each."""
        return [math.prod(shape) for shape in self.all]

    @functools.cache  # noqa: B019 (there is one)
    def values(self, seed: int) -> Tensor:
        """Elements for all parameters, one after the other: the same wherever they are used."""
        generator = torch.Generator("cpu").manual_seed(seed)
        return torch.randn(sum(self.sizes), generator=generator, device="cpu")


class Model:
    """Parameters somewhere, whose gradients lie in one tensor: to write that is to set them all."""

    def __init__(
        self, shapes: Shapes, device: torch.device, dtype: torch.dtype, made_from: torch.dtype
    ) -> None:
        self.shapes = shapes
        self.made_from = made_from  # what all numbers are rounded to before
        self.params: list[torch.nn.Parameter] = []
        start = self._rounded(0).to(device, dtype)
        self.gradient = torch.empty_like(start)
        pieces = (tensor.split(shapes.sizes) for tensor in (start, self.gradient))
        for index, (piece, grad, shape) in enumerate(zip(*pieces, shapes.all, strict=True)):
            skipped = int(index in UNALIGNED)
            memory = torch.zeros(piece.numel() + skipped, dtype=dtype, device=device)
            memory[skipped:].copy_(piece)
            self.params.append(torch.nn.Parameter(memory[skipped:].view(shape)))
            self.params[-1].grad = grad.view(shape)

    def _rounded(self, seed: int) -> Tensor:
        return self.shapes.values(seed).to(self.made_from)

    def draw(self, step: int) -> None:
        """Write the gradients of a step."""
        self.gradient.copy_(self._rounded(1 + step))


Run = Callable[[Model, torch.optim.Optimizer], None]


def eager(model: Model, optimizer: torch.optim.Optimizer) -> None:
    for step in range(1 + REPLAYS):
        model.draw(step)
        optimizer.step()


def on_a_side_stream(model: Model, optimizer: torch.optim.Optimizer) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eager(model, optimizer)
    torch.cuda.current_stream().wait_stream(stream)


def replayed(model: Model, optimizer: torch.optim.Optimizer) -> None:
    model.draw(0)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(1, 1 + REPLAYS):
        model.draw(step)
        graph.replay()
    torch.cuda.synchronize()  # before the graph goes


def contents(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> dict[str, Tensor]:
    """The weights and each kind of state, of all parameters one after the other, on the CPU."""
    state = vars(optimizer)["state"]
    found = {"weight": [p.detach() for p in params]}
    for name in dict.fromkeys(name for p in params for name in state[p]):
        found[name] = [state[p][name] for p in params if state[p].get(name) is not None]
    if "step" in found:  # float64 on a device, float32 on the CPU
        found["step"] = [step.double() for step in found["step"]]
    return {
        name: torch.cat([tensor.flatten() for tensor in tensors]).cpu()
        for name, tensors in found.items()
        if tensors
    }


def with_whole_weights(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor]
) -> dict[str, Any]:
    """The same, but weights as precise as they are kept, whatever keeps their lower half."""
    found = contents(optimizer, params)
    if "remainder" in found:
        del found["remainder"]
        found["weight"] = torch.cat([whole(optimizer, p).flatten() for p in params]).cpu()
    return found


def same_bits(found: Tensor, expected: Tensor) -> Tensor:
    """Where two tensors are the same, to the bit, but for which nan it is."""
    equal = found == expected
    if found.is_floating_point():
        equal &= found.signbit() == expected.signbit()
        equal |= found.isnan() & expected.isnan()
    return equal


def compare(
    what: str,
    shapes: Shapes,
    found: Tensor,
    expected: Tensor,
    tight: tuple[float, float] | None,
    coarse: tuple[float, float] | None,
) -> int:
    """How many elements are not the same to the bit.

    Raises:
        MismatchError: Some are beyond the tolerance; or without a tolerance, differ at all.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise MismatchError(
            f"{what}: {tuple(found.shape)} of {found.dtype}, "
            f"not {tuple(expected.shape)} of {expected.dtype}"
        )
    other = ~same_bits(found, expected)
    count = int(other.sum())
    if not count:
        return 0
    bad, allowed = other, 0.0
    if tight is not None:
        allowed = STRAY * found.numel() if coarse is not None else 0.0
        if found.is_floating_point():
            mine, theirs = found.double(), expected.double()
            bad = ~torch.isclose(mine, theirs, *tight, equal_nan=True)
            if coarse is not None:
                far = ~torch.isclose(mine, theirs, *coarse, equal_nan=True)
                bad, allowed = (far, 0.0) if bool(far.any()) else (bad, allowed)
    if int(bad.sum()) <= allowed:
        return count
    at = int(bad.nonzero()[0])
    raise MismatchError(
        f"{what}: {int(bad.sum())} of {found.numel()} elements are wrong; the first is "
        f"{place(shapes, found, at)}: {found[at].item()}, not {expected[at].item()}"
    )


def place(shapes: Shapes, found: Tensor, at: int) -> str:
    """Where an element is; in words."""
    if found.numel() != sum(shapes.sizes):  # a scale for each block, a counter for each parameter
        return f"number {at}"
    for index, size in enumerate(shapes.sizes):
        if at < size:
            return f"element {at} of parameter {index}, {list(shapes.all[index])}"
        at -= size
    raise AssertionError


def check(
    name: str, rule: str, more: dict[str, Any], clip: bool, shapes: Shapes, device: torch.device
) -> int:
    """One combination. Returns how many elements have other bits than on the CPU.

    Raises:
        MismatchError: One of its results is wrong.
    """
    kept = FORMATS[name]
    options = {**RULES[rule], **kept.options, **more}
    options |= {"max_grad_norm": MAX_NORM} if clip else {}
    title = ", ".join([rule, name, *more, *(["clipped"] if clip else [])])

    def ours(where: torch.device, run: Run) -> tuple[Any, list[torch.nn.Parameter]]:
        model = Model(shapes, where, kept.dtype, kept.dtype)
        optimizer = getattr(fusedopt, rule)(model.params, **options)
        torch.manual_seed(0)  # from which the seeds of random rounding are drawn
        run(model, optimizer)
        return optimizer, model.params

    usual = ours(device, eager)
    found, expected = (
        with_whole_weights(*usual),
        with_whole_weights(*ours(torch.device("cpu"), eager)),
    )
    if found.keys() != expected.keys():
        raise MismatchError(f"{title}: state has {', '.join(found)}, not {', '.join(expected)}")
    differ = sum(
        compare(
            f"{title}, against the CPU: {part}",
            shapes, found[part], expected[part], TIGHT, kept.coarse,
        )
        for part in expected
    )  # fmt: skip
    if kept.torchs is not None and not more:
        weight = torchs(rule, kept, clip, shapes, device)
        mine = found["weight"]
        # A bfloat16 beside its master is rounded from that.
        tolerance = COARSE if mine.dtype == BF16 else LOOSE
        what = f"{title}, against torch: weight"
        compare(what, shapes, mine, weight.to(mine.dtype), tolerance, None)
    bits = contents(*usual)
    for way, run in {"on a side stream": on_a_side_stream, "replayed": replayed}.items():
        others = contents(*ours(device, run))
        for part, value in bits.items():
            what = f"{title}, {way}: {part}"
            compare(what, shapes, others[part], value, None, None)
    return differ


def check_roots(device: torch.device, every: int) -> int:
    """Quotients and square roots. Returns how many of each have been computed.

    Adagrad's step from a weight of zero is nothing else. The roots are of the numbers from 1 to 4,
    whose mantissas are all that there are, or one in ``every`` of them; what is divided by them is
    first a power of two, then anything.

    Raises:
        MismatchError: One is not the exact one, rounded once.
    """
    squares = torch.arange(0x3F800000, 0x40800000, every, dtype=torch.int32, device="cpu")
    squares = squares.view(FLOAT32)
    shapes = Shapes(((squares.numel(),),))
    gradients = {  # whose squares are lost beside these
        "square roots": torch.full_like(squares, 2**-20),
        "quotients": shapes.values(0) * 2**-16,
    }
    for what, gradient in gradients.items():
        weight = torch.nn.Parameter(torch.zeros_like(squares).to(device))
        weight.grad = gradient.to(device)
        optimizer = fusedopt.Adagrad([weight], lr=1.0, eps=0.0)
        optimizer.state[weight]["sum"].copy_(squares)
        optimizer.step()
        # By float64: torch's own roots in float32 are not all rounded correctly.
        roots = squares.double().sqrt().float()
        expected = (-gradient.double() / roots.double()).float()
        compare(what, shapes, weight.detach().cpu(), expected, None, None)
    return squares.numel()


def torchs(rule: str, kept: Format, clip: bool, shapes: Shapes, device: torch.device) -> Tensor:
    """The weights after the same steps by torch."""
    model = Model(shapes, device, kept.torchs, kept.dtype)
    fused = {"fused": True} if rule == "AdamW" else {}
    optimizer = getattr(torch.optim, rule)(model.params, **RULES[rule], **fused)
    for step in range(1 + REPLAYS):
        model.draw(step)
        if clip:
            torch.nn.utils.clip_grad_norm_(model.params, MAX_NORM)
        optimizer.step()
    return contents(optimizer, model.params)["weight"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "fake"), default="cuda")
    parser.add_argument("--tensors", type=int, default=1000, help="small ones, beside ten others")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=list(FORMATS))
    options = parser.parse_args(arguments)
    device = torch.device(options.device, 0)
    shapes = Shapes((*LARGE, *((1 + index % 97,) for index in range(options.tensors))))
    print(f"torch {torch.__version__}; fusedopt's kernels for CUDA: {build_info()['CUDA']}")
    try:
        count = check_roots(device, 1 if options.device == "cuda" else 1009)
    except MismatchError as error:
        sys.exit(f"smoke: MISMATCH: {error}")
    print(f"{count} square roots and as many quotients are right")
    runs: list[tuple[str, dict[str, Any]]] = [(rule, {}) for rule in RULES]
    runs.append(("AdamW", {"ema_decay": 0.9}))
    for name in options.format:
        start, count, differ = time.monotonic(), 0, 0
        for (rule, more), clip in itertools.product(runs, (False, True)):
            try:
                differ += check(name, rule, more, clip, shapes, device)
            except MismatchError as error:
                sys.exit(f"smoke: MISMATCH: {error}")
            count += 1
        seconds = time.monotonic() - start
        print(
            f"{name}: {count} combinations are right ({seconds:.1f} s); {differ} numbers differ "
            "from the CPU's in their last bits, as norms, and what they clip, may",
            flush=True,
        )


if __name__ == "__main__":
    main()
