"""Averages of checkpoints and of predictions."""

from __future__ import annotations

import copy
import itertools
import json
import math
import struct
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from averages import DTYPES, assert_equal, disturb, make_model
from helpers import table
from torch import Tensor, nn

from fusedopt import ensemble
from fusedopt.averaging import average_checkpoints, average_predictions
from fusedopt.extension import kernels

# --- Checkpoints ----------------------------------------------------------------------------------

NAMES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


def save_safetensors(state: Mapping[str, Tensor], path: Path, padding: int = 0) -> None:
    """The format, by its description; with a header that is not aligned if wanted."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in state.items():
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        end = len(data) + flat.numel()
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), end],
        }
        data += bytes(flat.tolist())
    text = json.dumps(header).encode() + b" " * padding
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def make_states(count: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    model = make_model(dtype)
    states = []
    for step in range(count):
        disturb(model, step)
        states.append(copy.deepcopy(dict(model.state_dict())))
    return states


def expected_mean(states: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    mean = {}
    for name, last in states[-1].items():
        if last.is_floating_point() or last.is_complex():
            total = sum(
                w * s[name].to(torch.complex128) for w, s in zip(weights, states, strict=True)
            )
            mean[name] = total / sum(weights)
        else:
            mean[name] = last
    return mean


@pytest.mark.parametrize("kind", ["dicts", "torch", "legacy", "safetensors", "unaligned", "mixed"])
@table("weights", {"equal": None, "given": [0.0, 3, 1.0], "last 0": [1.0, 2.0, 0.0]})
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_average_of_checkpoints(
    dtype: torch.dtype, weights: list[float] | None, kind: str, tmp_path: Path
) -> None:
    states = make_states(3, dtype)
    sources: list[Any] = []
    for i, state in enumerate(states):
        path = tmp_path / f"{i}.{'safetensors' if kind in ('safetensors', 'unaligned') else 'pt'}"
        if kind == "dicts" or (kind == "mixed" and i == 1):
            sources.append(state)
            continue
        if path.suffix == ".pt":
            torch.save(state, path, _use_new_zipfile_serialization=kind != "legacy")
        else:
            save_safetensors(state, path, padding=kind == "unaligned")
        sources.append(path if i else str(path))
    result = average_checkpoints(sources, weights=weights)
    expected = expected_mean(states, weights or [1.0] * 3)
    assert list(result) == list(expected)
    for name, value in result.items():
        assert value.dtype == states[-1][name].dtype
        found, exact = value.cpu(), expected[name].cpu()  # those of files are on the CPU
        if value.dtype != dtype:
            assert torch.equal(found, exact)
        else:
            rtol = {torch.float64: 1e-14, torch.bfloat16: 2**-8}.get(dtype, 1e-6)
            torch.testing.assert_close(found.to(torch.complex128), exact, rtol=rtol, atol=rtol / 10)
    make_model(dtype).load_state_dict(result)


def test_counters_of_checkpoints_stay_integers() -> None:
    """As they do not when a state dict's values are added up and divided."""
    states = make_states(4)
    result = average_checkpoints(states)
    assert result["1.num_batches_tracked"].dtype == torch.int64
    assert result["1.num_batches_tracked"].item() == 4
    assert result["mask"].dtype == torch.bool


def test_sums_are_wide() -> None:
    """256 and many ones: in bfloat16 the sum stands still."""
    states = [{"w": torch.tensor([256.0], dtype=torch.bfloat16)}]
    states += [{"w": torch.tensor([1.0], dtype=torch.bfloat16)}] * 255
    naive = sum(state["w"] for state in states) / 256
    assert naive.item() == 1.0
    assert average_checkpoints(states)["w"].item() == 1.9921875  # 511 / 256, rounded


def test_equal_checkpoints_are_their_own_mean() -> None:
    state = make_states(1)[0]
    assert_equal(average_checkpoints([state] * 7), state)
    assert_equal(average_checkpoints([state] * 3, weights=[0.1, 0.2, 0.7]), state)


def test_results_share_no_memory() -> None:
    for count in (1, 2):
        states = make_states(count)
        pointers = {t.data_ptr() for state in states for t in state.values()}
        assert not pointers & {t.data_ptr() for t in average_checkpoints(states).values()}


def test_a_wider_checkpoint_widens_the_sum() -> None:
    third = torch.tensor([1 / 3], dtype=torch.float64)
    result = average_checkpoints([{"w": torch.zeros(1)}, {"w": third}])["w"]
    assert result.dtype == torch.float64
    assert result.item() == 1 / 6


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_checkpoints_of_8_bit_floats(dtype: torch.dtype, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.pt" for i in range(3)]
    for path, value in zip(paths, (0.5, 1.0, 4.5), strict=True):
        torch.save({"w": torch.full((3,), value).to(dtype)}, path)
    expected = torch.full((3,), sum(float(torch.tensor(v).to(dtype)) for v in (0.5, 1, 4.5)) / 3)
    found = average_checkpoints(paths)["w"]
    assert found.dtype == dtype
    assert torch.equal(found.float(), expected.to(dtype).float().cpu())
    wide = average_checkpoints([*paths, {"w": torch.full((3,), 2.0)}], weights=[1, 1, 1, 0])["w"]
    torch.testing.assert_close(wide, expected.cpu())


def test_new_memory_does_not_matter() -> None:
    """torch fills it with nan in this mode."""
    states, models = make_states(2), [Returns(1.0, STRUCTURES["tensor"]) for _ in range(2)]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        result = average_checkpoints(states)
        assert all(tensor.isfinite().all() for tensor in result.values())
        assert average_predictions(models, torch.ones(2)).tolist() == [1.0, 1.0]
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_has_no_weight_may_be_nan() -> None:
    states = [{"w": torch.tensor(x)} for x in (math.nan, 3.0, 5.0, math.inf)]
    assert average_checkpoints(states, weights=[0, 1, 1, 0])["w"].item() == 4.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@table("weights", {"equal": None, "given": [0.5, 3, 1e-30], "last 0": [1.0, 2.0, 0.0]})
def test_infinities_of_checkpoints_stay(dtype: torch.dtype, weights: list[float] | None) -> None:
    """Equal masks are their own mean, and beside them the numbers are what they are without."""
    mask = torch.triu(torch.full((3, 3), -math.inf), 1).to(dtype)
    mixed = [[-math.inf, 1.0], [2.0, 1.0], [math.inf, 1.0]]
    states = [
        {"mask": mask, "row": torch.tensor(row).to(dtype), "w": torch.rand(5).to(dtype)}
        for row in mixed
    ]
    result = average_checkpoints(states, weights=weights)
    assert torch.equal(result["mask"], mask)
    alone = average_checkpoints([{"w": s["w"]} for s in states], weights=weights)
    assert torch.equal(result["w"], alone["w"])
    assert result["row"][1] == 1
    first = average_checkpoints(states[:2])["row"][0]
    assert first.real == -math.inf
    last = average_checkpoints(states[1:], weights=[1, 1e-300])["row"][0]
    assert last.real == math.inf
    nothing = result["row"][0].real
    assert nothing == -math.inf if weights and not weights[-1] else nothing.isnan()


def on_cpu(average: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in average.items()}


@table("key", {"one": "model", "path": ("state", "model")})
def test_key(key: str | tuple[str, ...], tmp_path: Path) -> None:
    states = make_states(2)
    trees = [{"model": s, "epoch": i} for i, s in enumerate(states)]
    if key != "model":
        trees = [{"state": tree} for tree in trees]
    torch.save(trees[1], tmp_path / "b.pt")
    result = average_checkpoints([trees[0], tmp_path / "b.pt"], key=key)
    # What comes from a file alone is on the CPU.
    assert_equal(*(on_cpu(average) for average in (result, average_checkpoints(states))))


def test_only_one_file_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one before is gone when the next is loaded."""
    for i, state in enumerate(make_states(3)):
        torch.save(OrderedDict(state), tmp_path / f"{i}.pt")
    load, loaded = torch.load, []

    def watched(*args: Any, **options: Any) -> Any:
        assert options["weights_only"] is True
        assert options["mmap"] is True
        assert all(reference() is None for reference in loaded)
        result = load(*args, **options)
        loaded.append(weakref.ref(result["0.weight"]))
        return result

    monkeypatch.setattr(torch, "load", watched)
    average_checkpoints([tmp_path / f"{i}.pt" for i in range(3)])
    assert len(loaded) == 3


W, V = {"w": torch.ones(2)}, {"v": torch.ones(2)}


@table(
    "call",
    {
        "missing": ([W, V], {}, ValueError, r"checkpoints\[1\]: has no 'w'"),
        "more": ([W, {**W, **V}], {}, ValueError, r"checkpoints\[1\]: has 'v', which"),
        "shape": (
            [W, {"w": torch.ones(3)}],
            {},
            ValueError,
            r"\[1\]: 'w' is real, of shape \(3,\)",
        ),
        "kind": ([W, {"w": torch.ones(2, dtype=torch.int64)}], {}, ValueError, "'w' is integer"),
        "no tensor": (
            [{**W, "v": 3.0}, {**W, **V}],
            {},
            ValueError,
            "the first checkpoint no tensor",
        ),
        "empty": ([], {}, ValueError, "checkpoints is empty"),
        "single path": ("a.pt", {}, TypeError, "checkpoints is a single str"),
        "single dict": (W, {}, TypeError, "checkpoints is a single dict"),
        "number": (3, {}, TypeError, "checkpoints is a single int"),
        "element": ([W, 3], {}, TypeError, r"checkpoints\[1\] is no path and no dict: 3"),
        "few weights": ([W, W], {"weights": [1]}, ValueError, "weights has 1 elements for 2"),
        "negative": ([W, W], {"weights": [1, -1]}, ValueError, r"weights\[1\] must be .*: -1"),
        "nan": ([W, W], {"weights": [1, math.nan]}, ValueError, r"weights\[1\] must be .*: nan"),
        "text": ([W, W], {"weights": "11"}, TypeError, "weights is a single str"),
        "zero": ([W, W], {"weights": [0, 0]}, ValueError, r"weights must .*: \[0.0, 0.0\]"),
        "huge": ([W, W], {"weights": [1e308, 1e308]}, ValueError, "weights must have a sum"),
        "no key": ([W], {"key": "model"}, ValueError, r"\[0\]: has nothing under key 'model'"),
        "not there": ([W], {"key": ("w", "x")}, ValueError, "has nothing under key"),
        "no dict": ([W], {"key": "w"}, ValueError, "has no dict, but Tensor"),
        "nested": ([{"model": W}], {}, ValueError, r"has dicts: \['model'\]"),
        "both": ([{"t": torch.ones(()), "model": W}], {}, ValueError, r"has dicts: \['model'\]"),
        "nothing": ([{}], {}, ValueError, "is no dict of tensors"),
    },
)
def test_checkpoints_that_do_not_fit(
    call: tuple[Any, dict[str, Any], type[Exception], str],
) -> None:
    checkpoints, options, error, message = call
    with pytest.raises(error, match=message):
        average_checkpoints(checkpoints, **options)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        average_checkpoints([tmp_path / "absent.pt"])
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_bytes(b"no checkpoint at all")
        with pytest.raises(ValueError, match=rf"{name}: not a"):
            average_checkpoints([W, tmp_path / name])
    torch.save({"w": torch.ones(3)}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b.pt: 'w' is real, of shape \(3,\)"):
        average_checkpoints([W, tmp_path / "b.pt"])
    path = tmp_path / "b.safetensors"
    save_safetensors(W, path)
    for old, new in ((b'"F32"', b'"F99"'), (b'"shape": [2]', b'"shape": [3]')):
        path.write_bytes(path.read_bytes().replace(old, new))
        with pytest.raises(ValueError, match=r"b.safetensors: cannot read 'w'"):
            average_checkpoints([path])
        save_safetensors(W, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"b.safetensors: cannot read 'w'"):
        average_checkpoints([path])


# --- Predictions ----------------------------------------------------------------------------------


class Returns(nn.Module):
    """A model that returns what it is told to, made from its scale and input."""

    def __init__(self, scale: float, output: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.part = nn.Dropout()
        self.output = output

    def forward(self, x: Tensor) -> Any:
        assert not self.training
        assert not self.part.training
        assert not torch.is_grad_enabled()
        return self.output(self.scale * x)


STRUCTURES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, 2 * y),
    "dict": lambda y: {"logits": y, "more": [2 * y, None]},
}


@table("output", STRUCTURES)
@table("weights", {"equal": None, "given": [1, 0, 3]})
def test_average_of_predictions(
    output: Callable[[Tensor], Any], weights: list[float] | None
) -> None:
    models = [Returns(scale, output) for scale in (1.0, 2.0, 6.0)]
    x = torch.tensor([1.0, 10.0])
    result = average_predictions(models, x, weights=weights)
    factor = 3.0 if weights is None else 4.75
    expected = output(factor * x)
    flat = torch.utils._pytree.tree_flatten
    assert flat(result)[1] == flat(expected)[1]
    for mine, right in zip(flat(result)[0], flat(expected)[0], strict=True):
        assert mine is right or torch.allclose(mine, right)


@pytest.mark.parametrize("fails", [False, True])
def test_modes_are_restored_part_by_part(fails: bool) -> None:
    def fail(_: Tensor) -> Tensor:
        raise ZeroDivisionError

    models = [Returns(1.0, STRUCTURES["tensor"]), Returns(1.0, fail if fails else torch.neg)]
    models[0].part.eval()
    models[1].eval()
    if fails:
        with pytest.raises(ZeroDivisionError):
            average_predictions(models, torch.ones(2))
    else:
        assert not average_predictions(models, torch.ones(2)).any()
    assert [(m.training, m.part.training) for m in models] == [(True, False), (False, False)]


def test_modes_are_restored_of_a_model_within_another() -> None:
    inner = Returns(1.0, STRUCTURES["tensor"])
    outer = nn.Sequential(inner)
    inner.eval()
    average_predictions([inner, outer], torch.ones(2))
    assert (inner.training, inner.part.training, outer.training) == (False, False, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_masked_logits_stay_masked(dtype: torch.dtype) -> None:
    mask = torch.tensor([0.0, -math.inf, 0.0], dtype=dtype)
    models = [Returns(scale, lambda y: y.to(dtype) + mask) for scale in (1.0, 2.0, 3.0)]
    result = average_predictions(models, torch.ones(3))
    assert result.dtype == dtype
    assert result.tolist() == [2.0, -math.inf, 2.0]
    assert torch.softmax(result, 0).tolist() == [0.5, 0.0, 0.5]


def test_predictions_of_bfloat16_are_summed_wide() -> None:
    models = [Returns(s, lambda y: y.bfloat16()) for s in [256.0] + 255 * [1.0]]
    result = average_predictions(nn.ModuleList(models), x=torch.ones(1))
    assert result.dtype == torch.bfloat16
    assert result.item() == 1.9921875  # 511 / 256, rounded


IDENTITY = Returns(1.0, STRUCTURES["tensor"])


@table(
    "call",
    {
        "classes": ([Returns(1.0, torch.argmax)], {}, TypeError, r"\[0\] returns torch.int64"),
        "text": ([Returns(1.0, str)], {}, TypeError, r"models\[0\] returns str"),
        "structure": ([IDENTITY, Returns(1.0, STRUCTURES["tuple"])], {}, ValueError, "another"),
        "shape": ([IDENTITY, Returns(1.0, torch.sum)], {}, ValueError, r"models\[1\] returns ano"),
        "single": (nn.Sequential(nn.ReLU()), {}, TypeError, "models is a single Sequential"),
        "no model": ([IDENTITY, 3], {}, TypeError, r"models\[1\] is not a torch.nn.Module: 3"),
        "empty": ([], {}, ValueError, "models is empty"),
        "weights": ([IDENTITY], {"weights": [1, 2]}, ValueError, "weights has 2 elements for 1"),
    },
)
def test_predictions_that_have_no_mean(
    call: tuple[Any, dict[str, Any], type[Exception], str],
) -> None:
    models, options, error, message = call
    with pytest.raises(error, match=message):
        average_predictions(models, torch.ones(2), **options)


# --- The kernel -----------------------------------------------------------------------------------

# Around vectors, tiles, blocks; and on more than one thread.
SIZES = [0, 1, 2, 7, 8, 15, 16, 17, 33, 255, 256, 257, 511, 513, 4097, 200_001]
WEIGHTS = [1e-60, 0.001, 0.4999, 0.5, 0.75, 1 - 2**-20]


def bits_of(tensors: list[Tensor]) -> list[int]:
    return [n for t in tensors for n in t.reshape(-1).view(torch.int32).tolist()]


def run_kernel(
    means: list[Tensor], values: list[Tensor], weight: float, threads: int = 1
) -> list[Tensor]:
    found = [mean.clone() for mean in means]
    calls: list[None] = []
    assert kernels.average(found, values, weight, threads, lambda: calls.append(None))
    assert len(calls) == 1
    return found


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(
    "stored", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_kernel_is_lerp(dtype: torch.dtype, stored: torch.dtype, weight: float) -> None:
    """To the bit where both round once; where the processor cannot, but for a rounding."""
    if stored == torch.float64 != dtype:
        pytest.skip("wider than the mean: refused")
    generator = torch.Generator("cpu").manual_seed(0)
    means = [
        torch.randn(size, generator=generator, dtype=dtype, device="cpu")
        for size in (*SIZES, *([3] * 50))
    ]
    values = [
        (2 * mean + torch.randn(mean.shape, generator=generator, dtype=dtype, device="cpu")).to(
            stored
        )
        for mean in means
    ]
    values[3].copy_(means[3])  # a fixed point, if stored exactly
    wanted = [
        torch.lerp(mean, value.to(dtype), weight) for mean, value in zip(means, values, strict=True)
    ]
    found = run_kernel(means, values, weight)
    close = torch.finfo(dtype).eps if kernels.cpu_isa() == "base" else 0.0
    for mean, value, one, other in zip(means, values, found, wanted, strict=True):
        reach = torch.maximum(mean.abs(), value.to(dtype).abs())
        assert ((one - other).abs() <= close * 2 * reach).all()
    for threads in (2, 3, 8):
        assert bits_of(run_kernel(means, values, weight, threads)) == bits_of(found)


@pytest.mark.parametrize("weight", [*WEIGHTS, 1.0])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_on_infinities(stored: torch.dtype, weight: float) -> None:
    numbers = [math.inf, -math.inf, math.nan, 0.0, 1.5, -3.0]
    pairs = torch.tensor(list(itertools.product(numbers, numbers)), device="cpu").repeat(9, 1)
    mean, value = pairs.unbind(1)
    (found,) = run_kernel([mean.contiguous()], [value.to(stored).contiguous()], weight)
    odd = ~(mean.isfinite() & value.isfinite())
    wanted = torch.where(odd, mean + value, torch.lerp(mean, value, weight))
    if weight == 1:  # copies, whatever the mean was
        wanted = value
    close = 2e-7 if kernels.cpu_isa() == "base" else 0.0
    torch.testing.assert_close(found, wanted, rtol=close, atol=close, equal_nan=True)


@table(
    "lie",
    {
        "rows": lambda t: t,
        "columns": lambda t: t.mT.contiguous().mT,
        "channels last": lambda t: t.to(memory_format=torch.channels_last),
    },
)
def test_the_kernel_follows_the_order_in_memory(lie: Callable[[Tensor], Tensor]) -> None:
    plain = torch.arange(120.0, device="cpu").view(2, 3, 4, 5)
    mean, value = lie(plain), lie(plain.flip(0).bfloat16())
    assert torch.equal(run_kernel([mean], [value], 0.25)[0], torch.lerp(plain, plain.flip(0), 0.25))


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype, device="cpu")


def shared_with_next(size: int) -> list[Tensor]:
    memory = floats(size + 1)
    return [memory[:-1], memory[1:]]


@table(
    "pair",
    {
        "narrow mean": lambda: ([floats(4).bfloat16()], [floats(4).bfloat16()]),
        "wide value": lambda: ([floats(4)], [floats(4, dtype=torch.float64)]),
        "integers": lambda: ([floats(4)], [floats(4, dtype=torch.int16)]),
        "complex": lambda: ([floats(4).to(torch.complex64)], [floats(4).to(torch.complex64)]),
        "complex value": lambda: ([floats(4).double()], [floats(4).to(torch.complex64)]),
        "negated mean": lambda: ([torch._neg_view(floats(4))], [floats(4)]),
        "negated value": lambda: ([floats(4)], [torch._neg_view(floats(4))]),
        "another shape": lambda: ([floats(2, 3)], [floats(3, 2)]),
        "fewer": lambda: ([floats(4)], [floats(1)]),
        "other order": lambda: ([floats(2, 3)], [floats(3, 2).mT]),
        "gaps in the mean": lambda: ([floats(8)[::2]], [floats(4)]),
        "gaps in the value": lambda: ([floats(4)], [floats(8)[::2]]),
        "expanded mean": lambda: ([floats(1).expand(4)], [floats(4)]),
        "expanded value": lambda: ([floats(4)], [floats(1).expand(4)]),
        "means that overlap": lambda: (shared_with_next(4), [floats(4), floats(4)]),
        "one mean twice": lambda: ([floats(4)] * 2, [floats(4)] * 2),
        "value in a mean": lambda: (lambda pair: (pair[:1], pair[1:]))(shared_with_next(4)),
        "unaligned": lambda: (
            [floats(4)],
            [torch.frombuffer(bytearray(20), dtype=torch.float32, count=4, offset=1)],
        ),
        "sparse": lambda: ([floats(4)], [floats(4).to_sparse()]),
        "meta": lambda: ([floats(4).to("meta")], [floats(4).to("meta")]),
    },
)
def test_what_the_kernel_refuses_it_does_not_write(
    pair: Callable[[], tuple[list[Tensor], list[Tensor]]],
) -> None:
    """Nor what stands before it."""
    means, values = pair()
    first = floats(3)
    before = [mean.clone() for mean in means]

    def written() -> None:
        raise AssertionError("it was not")

    for order in (1, -1):
        for threads in (1, 2):
            assert not kernels.average(
                [first, *means][::order], [first + 1, *values][::order], 0.5, threads, written
            )
    assert torch.equal(first, floats(3))
    for mean, old in zip(means, before, strict=True):
        assert mean.is_meta or torch.equal(mean, old)
    with pytest.raises(ValueError, match="differ in number"):
        kernels.average([first], [], 0.5, 1, written)


@pytest.mark.parametrize("weight", [0.3, 0.7])
def test_what_the_kernel_refuses_is_averaged(weight: float) -> None:
    values = [floats(2, 3).mul_(5), torch._neg_view(floats(2, 3)), floats(1, 3).expand(2, 3)]
    for value in (*values, floats(3, 2).mT, floats(2, 6).double()[:, ::2]):
        mean = torch.arange(6.0, device="cpu").view(2, 3)
        wanted = torch.lerp(mean, value.to(mean), weight)
        ensemble.interpolate([mean], [value], weight)
        torch.testing.assert_close(mean, wanted)


def test_autograd_knows_of_the_kernel() -> None:
    mean = floats(4)
    leaf = floats(4).requires_grad_()
    product = leaf * mean
    ensemble.interpolate([mean], [floats(4) + 1], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():
        mean = floats(4)
        ensemble.interpolate([mean], [floats(4) + 1], 0.5)
    assert mean.tolist() == [1.5] * 4


@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_of_the_kernels_word_is_not_before_it(after: bool) -> None:
    """Ctrl-C may arrive in the Python that is told."""
    mean, calls, told = floats(4), [], []

    def written() -> None:
        calls.append(None)
        if not after and len(calls) == 1:
            raise KeyboardInterrupt
        told.append(mean.tolist())
        if len(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kernels.average([mean], [floats(4) + 1], 0.5, 1, written)
    assert len(calls) == 2
    assert told == [[1.5] * 4] * (1 + after)
