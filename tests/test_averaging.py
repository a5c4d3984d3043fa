"""Averages of weights."""

from __future__ import annotations

import copy
import itertools
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from averages import DTYPES, assert_equal, disturb, interrupted_everywhere, make_model
from helpers import (
    DEVICE,
    needs_host_memory,
    needs_running_statistics,
    random_tensor,
    table,
    through_a_file,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import fusedopt
from fusedopt import averaging, ensemble, swapping
from fusedopt.averaging import EMA, SWA, FusedEMA, WeightAverage


def contents(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


# --- EMA and SWA ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@table("options", {"plain": {"warmup": False}, "warmup": {}, "rarely": {"update_every": 3}})
@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_ema_is_the_formula(
    dtype: torch.dtype, options: dict[str, Any], start: int, buffers: str
) -> None:
    model = make_model(dtype)
    ema = EMA(model, 0.5, start=start, buffers=buffers, **options)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    named = dict(model.named_buffers())
    expected = {n: t if t.dtype != dtype else t.to(wide) for n, t in contents(model).items()}
    for step in range(10):
        disturb(model, step)
        ema.update(model)
        t, rest = divmod(step + 1 - start, options.get("update_every", 1))
        if step < start:
            expected = {n: v.to(expected[n].dtype) for n, v in contents(model).items()}
        elif rest == 0:
            decay = min(0.5, (1 + t) / (10 + t)) if options.get("warmup", True) else 0.5
            for name, value in contents(model).items():
                if value.dtype != dtype or (name in named and buffers == "copy"):
                    expected[name] = value.to(expected[name].dtype)
                else:
                    expected[name] = decay * expected[name] + (1 - decay) * value.to(wide)
            assert ema.n_averaged == t
    for name, average in ema.averages.items():
        copied = name in named and (buffers == "copy" or named[name].dtype != dtype)
        assert average.dtype == (
            named[name].dtype if copied else torch.promote_types(dtype, torch.float32)
        )
        rtol = 1e-13 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(
            average.to(expected[name].dtype), expected[name], rtol=rtol, atol=rtol / 10
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swa_is_the_mean(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    swa, taken = SWA(model, start=2, every=3), []
    for step in range(12):
        disturb(model, step)
        swa.update(model)
        if step + 1 in (5, 8, 11):
            taken.append(contents(model))
        assert swa.n_averaged == len(taken)
        if step < 4:  # the copy of the last that was let pass
            assert not taken
            wide = swa.averages["0.weight"].dtype
            if step < 2:
                latest = contents(model)["0.weight"].to(wide)
            assert torch.equal(swa.averages["0.weight"], latest)
    for name, _ in model.named_parameters():
        mean = torch.stack([c[name].to(torch.complex128) for c in taken]).mean(0)
        torch.testing.assert_close(
            swa.averages[name].to(torch.complex128), mean, rtol=1e-6, atol=1e-7
        )
    assert_equal(
        {n: swa.averages[n] for n, _ in model.named_buffers()},
        {n: taken[-1][n] for n, _ in model.named_buffers()},
    )


def test_an_average_of_bfloat16_moves() -> None:
    """torch's, in the model's dtype, does not."""
    model = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema = EMA(model, decay=0.999, warmup=False)
    stock = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    stock.update_parameters(model)
    with torch.no_grad():
        model.weight.fill_(1.5)
    for _ in range(3000):
        ema.update(model)
    for _ in range(10):
        stock.update_parameters(model)
    assert (stock.module.weight == 1.0).all()
    expected = torch.full((8, 8), 1.5 - 0.5 * 0.999**3000)
    torch.testing.assert_close(ema.averages["weight"], expected, rtol=1e-4, atol=0)


@needs_running_statistics
def test_counters_are_not_averaged() -> None:
    model = nn.BatchNorm1d(2)
    averages = [EMA(model, buffers="average"), SWA(model, start=0, buffers="average")]
    for _ in range(5):
        model(torch.randn(4, 2))
        for average in averages:
            average.update(model)
    for average in averages:
        assert average.averages["num_batches_tracked"].item() == 5
        assert average.averages["num_batches_tracked"].dtype == torch.int64
        assert not torch.equal(average.averages["running_mean"], model.running_mean)


def test_nothing_is_shared_with_the_model_or_requires_grad() -> None:
    model = make_model()
    for average in (EMA(model), SWA(model, start=0)):
        average.update(model)
        live = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
        for tensor in average.averages.values():
            assert tensor.data_ptr() not in live
            assert not tensor.requires_grad


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_the_fused_step_has_the_same_average(dtype: torch.dtype, warmup: bool) -> None:
    """But for how often a product is rounded before it is added: once less in the step."""
    model = make_model(dtype)
    optimizer = fusedopt.SGD(model.parameters(), lr=0.1, ema_decay=0.9, ema_warmup=warmup)
    ema = EMA(model, 0.9, warmup=warmup)
    for step in range(50):
        for i, p in enumerate(model.parameters()):
            p.grad = random_tensor(p.shape, dtype, 100 * step + i)
        optimizer.step()
        ema.update(model)
    rtol = 1e-14 if dtype == torch.float64 else 1e-6
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            ema.averages[name], optimizer.state[p]["ema"], rtol=rtol, atol=rtol
        )


def test_current_decay() -> None:
    model = nn.Linear(2, 2)
    ema = EMA(model, 0.3)
    decays = []
    for _ in range(4):
        decays.append(ema.current_decay)
        ema.update(model)
    assert decays == [2 / 11, 3 / 12, 0.3, 0.3]
    assert EMA(model, 0.3, warmup=False).current_decay == 0.3


@table("make", {"EMA": EMA, "SWA": lambda model, **options: SWA(model, start=0, **options)})
def test_an_average_of_equal_weights_is_these(make: Callable[..., WeightAverage]) -> None:
    model = make_model()
    average = make(model)
    for _ in range(100):
        average.update(model)
    assert_equal(average.averages, contents(model))


def watch_kernel(monkeypatch: pytest.MonkeyPatch, slow: bool) -> list[bool]:
    """What kernels.average() answers; no, if slow, so that the way of devices is taken."""
    average, seen = ensemble.kernels.average, []

    def watched(means: list[Tensor], values: list[Tensor], *rest: Any) -> bool:
        seen.append(not slow and average(means, values, *rest))
        return seen[-1]

    monkeypatch.setattr(ensemble.kernels, "average", watched)
    return seen


@table("slow", {"fast": False, "slow": True})
def test_batches(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one dtype, and of few elements: in each only so much is widened at once."""
    monkeypatch.setattr(averaging, "_BATCH", 6)
    answers = watch_kernel(monkeypatch, slow)
    model = nn.ModuleList(
        nn.Linear(1, size, dtype=dtype)
        for size in (1, 5, 2, 9, 1, 3)
        for dtype in (torch.bfloat16, torch.float64)
    )
    ema = EMA(model, 0.5, warmup=False)
    before = contents(model)
    disturb(model, 0)
    interpolate, lerp, seen = ensemble.interpolate, torch._foreach_lerp_, []

    def watched(means: list[Tensor], values: list[Tensor], weight: float) -> None:
        assert len({tensor.dtype for tensor in means}) == 1
        assert len(means) == 1 or sum(mean.numel() for mean in means) <= 6
        seen.append(len(means))
        interpolate(means, values, weight)

    def watched_lerp(means: list[Tensor], values: list[Tensor], weight: float) -> None:
        assert len({tensor.dtype for tensor in (*means, *values)}) == 1
        lerp(means, values, weight)

    monkeypatch.setattr(averaging, "interpolate", watched)
    monkeypatch.setattr(torch, "_foreach_lerp_", watched_lerp)
    ema.update(model)
    assert answers == [not slow and DEVICE.type == "cpu"] * len(seen)
    assert sum(seen) == len(before)
    assert 2 < len(seen) < len(before)
    for name, now in contents(model).items():
        expected = (before[name].double() + now.double()) / 2
        torch.testing.assert_close(ema.averages[name].double(), expected, rtol=1e-6, atol=1e-7)


def test_an_update_reads_no_value() -> None:
    """So that nobody waits for a device: tensors without data do as well."""
    model = make_model(torch.bfloat16).to("meta")
    for average in (EMA(model, buffers="average"), SWA(model, start=0)):
        for _ in range(3):
            average.update(model)
            with average.swap(model):
                pass
        assert average.n_averaged == 3


@table(
    "change",
    {
        "no bias": (lambda: nn.Sequential(nn.Linear(2, 3, bias=False)), "has no '0.bias'"),
        "shape": (lambda: nn.Sequential(nn.Linear(3, 2)), r"'0.weight' in the shape \(2, 3\)"),
        "more": (lambda: nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 3)), "has '1.weight', which"),
        "name": (lambda: nn.ModuleList([nn.ModuleList([nn.Linear(2, 3)])]), "has no '0.weight'"),
    },
)
def test_another_model_is_refused(change: tuple[Callable[[], nn.Module], str]) -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    average = EMA(model)
    before = copy.deepcopy(average.averages)
    other, message = change[0](), change[1]
    for use in (average.update, average.copy_to, lambda m: average.swap(m).__enter__()):
        with pytest.raises(ValueError, match=message):
            use(other)
    foreign = EMA(other).state_dict()
    with pytest.raises(ValueError, match="state_dict has"):
        average.load_state_dict(foreign)
    assert_equal(average.averages, before)
    assert average.n_averaged == 0
    with average.swap(model):  # it is not taken to be swapped
        pass


@table(
    "options",
    {
        "decay 1": ({"decay": 1.0}, ValueError, "decay must be at least 0 and below 1: 1.0"),
        "decay nan": ({"decay": math.nan}, ValueError, "decay must be"),
        "decay None": ({"decay": None}, TypeError, "decay is not a number: None"),
        "warmup": ({"warmup": 1}, TypeError, "warmup is not True or False: 1"),
        "every 0": ({"update_every": 0}, ValueError, "update_every must be at least 1: 0"),
        "every True": ({"update_every": True}, TypeError, "update_every is not an integer: True"),
        "every 1.0": ({"update_every": 1.0}, TypeError, "update_every is not an integer: 1.0"),
        "start": ({"start": -1}, ValueError, "start must be at least 0: -1"),
        "dtype": ({"dtype": torch.bfloat16}, ValueError, "dtype must be .*: torch.bfloat16"),
        "device": ({"device": "nowhere"}, ValueError, "device is not a device: 'nowhere'"),
        "buffers": ({"buffers": "both"}, ValueError, "buffers must be one of .*: 'both'"),
        "model": ({"model": 3}, TypeError, "model is not a torch.nn.Module: 3"),
        "nothing": ({"model": nn.ReLU()}, ValueError, "model has nothing to average"),
    },
)
def test_bad_arguments(options: tuple[dict[str, Any], type[Exception], str]) -> None:
    arguments, error, message = options
    arguments = {"model": nn.Linear(2, 2), **arguments}
    with pytest.raises(error, match=message):
        EMA(**arguments)
    if not {"decay", "warmup"} & arguments.keys():
        arguments = {"start": 0, **arguments}
        if "update_every" in arguments:
            arguments["every"] = arguments.pop("update_every")
        with pytest.raises(error, match=message.replace("update_", "")):
            SWA(**arguments)


@table("slow", {"fast": False, "slow": True})
@pytest.mark.parametrize("weight", [0.001, 0.3, 0.5, 0.9, 1e-60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_infinities_stay_what_they_are(
    dtype: torch.dtype, weight: float, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is finite has torch's bits, also beside them."""
    answers = watch_kernel(monkeypatch, slow)
    numbers = [math.inf, -math.inf, 0.0, -0.0, 1.5, -1e30] + [math.nan] * (not dtype.is_complex)
    pairs = torch.tensor(list(itertools.product(numbers, numbers)), dtype=torch.float64)
    order = torch.randperm(
        len(pairs), generator=torch.Generator("cpu").manual_seed(0), device="cpu"
    )

    def whole(parts: Tensor) -> Tensor:
        parts = parts.to(torch.float64 if dtype == torch.float64 else torch.float32).contiguous()
        other = parts[order.to(parts.device)]
        return torch.complex(parts, other) if dtype.is_complex else parts

    mean, value = whole(pairs[:, 0]), whole(pairs[:, 1])
    found = mean.clone()
    ensemble.interpolate([found], [value], weight)
    assert answers == [not slow and DEVICE.type == "cpu" and not dtype.is_complex]
    finite = mean.isfinite() & value.isfinite()
    wanted = whole(pairs.sum(1))  # of infinities and nan
    # In the same places, as torch's vectors do not round complex numbers as its loops do.
    exact = torch.where(finite, mean, 1)
    torch._foreach_lerp_([exact], [torch.where(finite, value, 1)], weight)
    parts = [torch.view_as_real(t) if dtype.is_complex else t for t in (mean, value, found, wanted)]
    odd = ~(parts[0].isfinite() & parts[1].isfinite())
    torch.testing.assert_close(parts[2][odd], parts[3][odd], rtol=0, atol=0, equal_nan=True)
    as_bits = torch.int32 if dtype == torch.float32 else torch.int64
    assert torch.equal(found[finite].view(as_bits), exact[finite].view(as_bits))


@table("make", {"EMA": lambda m: EMA(m, 0.5), "SWA": lambda m: SWA(m, start=1)})
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_of_infinities_are_their_own_average(
    make: Callable[[nn.Module], WeightAverage], dtype: torch.dtype
) -> None:
    model = nn.Linear(3, 1, bias=False, dtype=dtype)
    rows = [[-math.inf, math.inf, 1.0], [-math.inf, math.inf, 3.0], [-math.inf, 0.0, math.inf]]
    average = make(model)
    for row in rows:
        with torch.no_grad():
            model.weight.copy_(torch.tensor([row]))
        average.update(model)
    assert average.averages["weight"].tolist() == [[-math.inf, math.inf, math.inf]]
    with torch.no_grad():
        model.weight.fill_(-math.inf)
    average.update(model)
    found = average.averages["weight"][0].tolist()
    assert found[0] == -math.inf
    assert all(map(math.isnan, found[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@table("slow", {"fast": False, "slow": True})
@table("make", {"EMA": lambda m: EMA(m, 0.5, buffers="average"), "SWA": lambda m: SWA(m, start=0)})
def test_an_update_is_whole_wherever_it_is_interrupted(
    make: Callable[[nn.Module], WeightAverage],
    dtype: torch.dtype,
    slow: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(averaging, "_BATCH", 3)
    answers = watch_kernel(monkeypatch, slow)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).to(dtype)

    def begin() -> WeightAverage:
        torch.manual_seed(0)
        average = make(model)
        for value in average.averages.values():
            value.fill_(2)
        average.n_averaged = average._calls = 3
        return average

    def state(average: WeightAverage) -> dict[str, Tensor]:
        counts = torch.tensor([average.n_averaged, average._calls])
        return {**average.averages, "counts": counts}

    before = state(begin())
    average = begin()
    average.update(model)
    after = state(average)
    assert set(answers) == {not slow and DEVICE.type == "cpu"}
    seen = set()
    for average in interrupted_everywhere(begin, lambda average: average.update(model)):
        done = average.n_averaged == 4
        assert_equal(state(average), after if done else before)
        seen.add(done)
    assert seen == {False, True}


# --- Using them -----------------------------------------------------------------------------------


def averaged(model: nn.Module, **options: Any) -> EMA:
    ema = EMA(model, 0.5, **options)
    for step in range(3):
        disturb(model, step)
        ema.update(model)
    disturb(model, 3)
    return ema


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("fails", [False, True])
def test_swap(dtype: torch.dtype, buffers: str, fails: bool) -> None:
    model = make_model(dtype)
    ema = averaged(model, buffers=buffers)
    own, averages = contents(model), {n: t.clone() for n, t in ema.averages.items()}
    addresses = [t.data_ptr() for t in (*model.parameters(), *model.buffers())]

    def evaluate() -> None:
        with ema.swap(model):
            for name, value in contents(model).items():
                assert torch.equal(value, averages[name].to(value.dtype))
            assert addresses == [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            evaluate()
    else:
        evaluate()
    assert_equal(contents(model), own)
    assert_equal(ema.averages, averages)
    ema.update(model)  # and goes on


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swap_keeps_no_copy_of_the_model(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the average's dtype; one tensor is aside at a time."""
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False, dtype=dtype) for _ in range(5)))
    ema = EMA(model)
    clone, clones = Tensor.clone, []

    def alive() -> int:
        return sum(reference() is not None for reference in clones)

    def watched(tensor: Tensor) -> Tensor:
        assert alive() == 0 or dtype == torch.bfloat16
        result = clone(tensor)
        if not (clones and clones[-1]() is result):  # set_default_device() calls a second time
            clones.append(weakref.ref(result))
        return result

    monkeypatch.setattr(Tensor, "clone", watched)
    with ema.swap(model):
        assert len(clones) == 5
        assert alive() == (5 if dtype == torch.bfloat16 else 0)


def test_swap_when_memory_runs_out_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    ema = averaged(model)
    own, averages = contents(model), {n: t.clone() for n, t in ema.averages.items()}
    clone, left = Tensor.clone, [3]

    def scarce(tensor: Tensor, **options: Any) -> Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError
        return clone(tensor, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "clone", scarce)
        with pytest.raises(MemoryError), ema.swap(model):
            pytest.fail("the block is not entered")
    assert_equal(contents(model), own)
    assert_equal(ema.averages, averages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_interrupt_between_any_two_copies(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(dtype)
    ema = averaged(model)
    own, averages = contents(model), {n: t.clone() for n, t in ema.averages.items()}
    copy_ = Tensor.copy_

    copies_on_entry = sum(2 if own[n].dtype == t.dtype else 1 for n, t in averages.items())
    for at in range(1, copies_on_entry + 1):
        calls = itertools.count(1)

        def copies(tensor: Tensor, source: Tensor) -> Tensor:
            copy_(tensor, source)
            if next(calls) == at:  # noqa: B023 # called within this round only
                raise KeyboardInterrupt
            return tensor

        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "copy_", copies)
            with pytest.raises(KeyboardInterrupt), ema.swap(model):
                pytest.fail("the block is not entered")
        assert_equal(contents(model), own)
        assert_equal(ema.averages, averages)


def test_no_use_within_swap() -> None:
    model = make_model()
    ema = averaged(model)
    state = copy.deepcopy(ema.state_dict())
    with ema.swap(model):
        for name, misuse in {
            "swap": lambda: ema.swap(model).__enter__(),
            "update": lambda: ema.update(model),
            "copy_to": lambda: ema.copy_to(model),
            "state_dict": ema.state_dict,
            "load_state_dict": lambda: ema.load_state_dict(state),
        }.items():
            with pytest.raises(RuntimeError, match=rf"no {name}\(\) within swap"):
                misuse()
    assert_equal(ema.state_dict(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_within_swap_is_told(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    ema = averaged(model)
    own = contents(model)
    with pytest.raises(RuntimeError, match=r"has written to '2\.bias'"), ema.swap(model):
        nn.init.ones_(model[2].bias)
    assert_equal(contents(model), own)
    assert (ema.averages["2.bias"] == 1).all()


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_norm_refreshed_within_swap_stays_with_the_average(
    dtype: torch.dtype, buffers: str
) -> None:
    model = make_model(dtype)
    ema = averaged(model, buffers=buffers)
    own = contents(model)
    with ema.swap(model):
        update_bn([torch.randn(8, 4, dtype=dtype) for _ in range(3)], model)
        refreshed = contents(model)
    assert_equal(contents(model), own)
    assert refreshed["1.num_batches_tracked"] == 3
    with ema.swap(model):
        assert_equal(contents(model), refreshed)


def test_swap_within_inference_mode_and_with_a_model_that_moves() -> None:
    model = make_model()
    ema = averaged(model)
    own = contents(model)
    average = ema.averages["0.weight"].clone()
    with torch.inference_mode(), ema.swap(model):
        assert torch.equal(model[0].weight, average)
    assert_equal(contents(model), own)
    with ema.swap(model):
        model.double().float()  # other tensors, the same values
    assert_equal(contents(model), own)
    disturb(model, 4)
    ema.update(model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copy_to(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    ema = averaged(model)
    target = copy.deepcopy(model)
    ema.copy_to(target)
    for name, value in contents(target).items():
        assert torch.equal(value, ema.averages[name].to(value.dtype))
    assert all(p.requires_grad for p in target.parameters())


def tie(model: nn.Sequential) -> None:
    """Two parameters in the same memory."""
    model[3].bias.data = model[2].bias.data


def overlap(model: nn.Sequential) -> None:
    """In parts of it, in another shape."""
    memory = model[0].weight.data.view(-1)
    model[2].bias.data = memory[2:6]
    model[3].bias.data = memory[4:8]


def view(model: nn.Sequential) -> None:
    """Buffers that are views of parameters."""
    model.register_buffer("first", model[0].weight.detach()[0])
    model.register_buffer("bits", model[0].weight.detach().view(torch.uint8))


def flatten(model: nn.Sequential) -> None:
    """All in one buffer, with one version counter for all of them."""
    named = [*model.named_parameters(), *model.named_buffers()]
    floats = [(n, t) for n, t in named if t.is_floating_point()]
    flat = torch.cat([t.detach().reshape(-1) for _, t in floats])
    for (name, tensor), part in zip(
        floats, flat.split([t.numel() for _, t in floats]), strict=True
    ):
        owner, _, key = name.rpartition(".")
        part = part.view(tensor.shape)
        module = model.get_submodule(owner)
        if isinstance(tensor, nn.Parameter):
            setattr(module, key, nn.Parameter(part))
        else:
            module._buffers[key] = part
    model[3].weight = model[2].weight
    model.register_buffer("flat", flat)


SHARED = {"tied": tie, "overlapping": overlap, "views": view, "flat": flatten}


@needs_host_memory
@table("share", SHARED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swap_of_weights_that_share_memory(
    share: Callable[[nn.Sequential], None], dtype: torch.dtype
) -> None:
    model = make_model(dtype)
    share(model)
    ema = averaged(model)
    own, averages = contents(model), {n: t.clone() for n, t in ema.averages.items()}
    with ema.swap(model):
        for name, p in model.named_parameters():
            if share is not overlap:
                assert torch.equal(p, averages[name].to(dtype))
        assert torch.equal(model[3].bias, averages["3.bias"].to(dtype))  # the last of all
    assert_equal(contents(model), own)
    assert_equal(ema.averages, averages)
    with ema.swap(model):
        update_bn([torch.randn(8, 4, dtype=dtype) for _ in range(3)], model)
        refreshed = model[1].running_mean.clone()
    assert_equal(contents(model), own)
    assert torch.equal(ema.averages["1.running_mean"].to(dtype), refreshed)
    with pytest.raises(RuntimeError, match="has written to"), ema.swap(model):
        nn.init.ones_(model[2].bias)
    assert_equal(contents(model), own)
    ema.copy_to(model)
    assert torch.equal(model[3].bias, ema.averages["3.bias"].to(dtype))


def replace_buffer(model: nn.Sequential) -> None:
    model.cache = torch.full((3,), 7.0, dtype=model.cache.dtype)


def replace_in_inference_mode(model: nn.Sequential) -> None:
    with torch.inference_mode():
        model.cache = model.cache * 2


def reshape_buffer(model: nn.Sequential) -> None:
    model.cache = torch.zeros(5)
    model[1].running_mean = torch.zeros(1, 4)


def remove(model: nn.Sequential) -> None:
    del model[0].weight
    del model[1].running_var
    model[2].bias = None
    model[0].weight = torch.zeros(4, 4)  # no parameter


def replace_parameter(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(torch.zeros(2, 2))
    model[3] = nn.Linear(4, 4)


def repoint(model: nn.Sequential) -> None:
    model[0].weight.data = torch.zeros(4, 4)
    model[2].bias.data = torch.zeros(9)


def cast(model: nn.Sequential) -> None:
    model.to(torch.float16)


def free(model: nn.Sequential) -> None:
    model[0].weight.untyped_storage().resize_(0)


CHANGES = {
    "new buffer": replace_buffer,
    "new buffer of inference mode": replace_in_inference_mode,
    "other shapes": reshape_buffer,
    "removed": remove,
    "new parameter": replace_parameter,
    "other memory": repoint,
    "cast": cast,
}


@needs_host_memory
@table("change", {**CHANGES, "freed": free})
@table("which", {"EMA": "EMA", "bfloat16": "bfloat16", "shared": "shared", "FusedEMA": "FusedEMA"})
def test_what_the_block_does_to_the_model_is_undone(
    change: Callable[[nn.Sequential], None], which: str
) -> None:
    """The same tensors are in their places and order, in their own memory, with every bit."""
    model: Any
    if which == "FusedEMA":
        model, _, ema = fused()
    else:
        model = make_model(torch.bfloat16 if which == "bfloat16" else torch.float32)
        if which == "shared":
            flatten(model)
        ema = averaged(model)
    own, parts = contents(model), list(model)
    named = [*model.named_parameters(), *model.named_buffers()]
    addresses = [t.data_ptr() for _, t in named]
    averages = {n: t.clone() for n, t in getattr(ema, "averages", {}).items()}
    if change is free and which == "EMA":
        with (
            pytest.raises(RuntimeError, match=r"'0.weight'; that was the average"),
            ema.swap(model),
        ):
            change(model)
        averages["0.weight"] = own["0.weight"]
    else:
        with ema.swap(model):
            change(model)
    model[3] = parts[3]  # of the modules themselves nobody promises anything
    assert_equal(contents(model), own)
    assert all(
        now is before
        for (_, now), (_, before) in zip(
            [*model.named_parameters(), *model.named_buffers()], named, strict=True
        )
    )
    if change is not free:
        assert addresses == [t.data_ptr() for _, t in named]
    if averages:
        for name, average in ema.averages.items():
            if name in ("cache", "flat", "1.running_mean", "1.running_var"):
                continue  # what the block did to buffers
            assert torch.equal(average, averages[name])
        if change in (replace_buffer, replace_in_inference_mode):
            assert (ema.averages["cache"] != averages["cache"]).all()
        ema.update(model)
        ema.state_dict()
    with ema.swap(model):
        pass


@needs_host_memory
@table("share", {"apart": lambda model: None, "flat": flatten, "overlapping": overlap})
@pytest.mark.parametrize("writes", ["", "before", "after"])
def test_swaps_of_several_averages_nest(
    share: Callable[[nn.Sequential], None], writes: str
) -> None:
    """What an inner block gives back, it has not written to."""
    model = make_model(torch.float32)
    share(model)
    outer, inner = averaged(model), averaged(model)
    own = contents(model)
    averages = [{n: t.clone() for n, t in each.averages.items()} for each in (outer, inner)]
    complaint = pytest.raises(RuntimeError, match=r"has written to '2\.weight'")
    with complaint if writes else nullcontext(), outer.swap(model):
        if writes == "before":
            nn.init.ones_(model[2].weight)
            averages[0]["2.weight"].fill_(1)
        for _ in range(2):
            with inner.swap(model):
                assert torch.equal(model[2].weight, averages[1]["2.weight"])
            assert torch.equal(model[2].weight, averages[0]["2.weight"])
        if writes == "after":
            nn.init.ones_(model[2].weight)
            averages[0]["2.weight"].fill_(1)
    assert_equal(contents(model), own)
    assert torch.equal(outer.averages["2.weight"], averages[0]["2.weight"])
    assert_equal(inner.averages, averages[1])


@needs_host_memory
def test_nested_swaps_give_back_what_both_blocks_have_replaced() -> None:
    model = make_model(torch.float32)
    outer, inner = averaged(model), averaged(model)
    before = [*model.named_parameters(), *model.named_buffers()]
    own = contents(model)
    with outer.swap(model):
        with inner.swap(model):
            for module, name in ((model[0], "weight"), (model[1], "running_mean")):
                tensor = getattr(module, name)
                delattr(module, name)
                if isinstance(tensor, nn.Parameter):
                    module.register_parameter(name, tensor)
                else:
                    module.register_buffer(name, tensor)
        model[0].weight = nn.Parameter(torch.full_like(model[0].weight, 9.0))
        model[1].running_mean = torch.full_like(model[1].running_mean, 7.0)
    after = [*model.named_parameters(), *model.named_buffers()]
    assert all(now[1] is then[1] for now, then in zip(after, before, strict=True))
    assert_equal(contents(model), own)


@needs_host_memory
def test_a_swap_within_that_of_a_part_writes_to_nothing() -> None:
    """Though a buffer of the whole is a view of a parameter of the part."""
    model, _, whole = fused()
    model[2].register_buffer("view", model[0].weight.detach())
    part = averaged(model[0])
    own = contents(model)
    with part.swap(model[0]), whole.swap(model):
        pass
    assert_equal(contents(model), own)


def test_what_was_none_is_none_after_a_swap() -> None:
    model = nn.Linear(3, 2, bias=False)
    with averaged(model).swap(model):
        model.bias = nn.Parameter(torch.ones(2))
    assert model.bias is None


def test_a_swap_within_that_of_a_model_with_the_same_memory_writes_to_nothing() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    second.weight = nn.Parameter(first.weight.detach())
    own = contents(first)
    averages = averaged(first), averaged(second)
    own = contents(first)
    with averages[0].swap(first), averages[1].swap(second):
        pass
    assert_equal(contents(first), own)


def test_torch_can_exchange_tensors_after_a_swap() -> None:
    """It refuses those to which there is a weak reference."""
    model = make_model(torch.float32)
    ema = averaged(model)
    with ema.swap(model):
        pass
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        assert model.half()[0].weight.dtype == torch.float16
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@needs_host_memory
@pytest.mark.parametrize("cls", [EMA, SWA])
def test_update_from_a_model_without_values_changes_nothing(cls: type) -> None:
    model = make_model(torch.float32)
    average = EMA(model) if cls is EMA else SWA(model, start=0)
    before = {n: t.clone() for n, t in average.averages.items()}
    disturb(model, 0)
    model[2].to("meta")
    with pytest.raises(ValueError, match=r"'2\.weight' on the device 'meta'"):
        average.update(model)
    assert_equal(average.averages, before)
    assert average.n_averaged == 0


def test_a_buffer_that_forward_replaces_stays_with_the_average() -> None:
    """Evaluated in inference mode, from which nothing can be written to outside."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.seen + 1
            return x * self.weight

    model = Counts()
    ema = averaged(model)
    own, seen = contents(model), ema.averages["seen"].clone()
    with ema.swap(model), torch.inference_mode():
        model(torch.ones(2))
    assert_equal(contents(model), own)
    assert torch.equal(ema.averages["seen"], seen + 1)
    model.seen.add_(1)  # no tensor of inference mode
    ema.update(model)


def test_a_model_of_inference_mode_has_an_average() -> None:
    with torch.inference_mode():
        model = make_model()
        ema = EMA(model, 0.5)
    own = contents(model)
    ema.update(model)
    with ema.swap(model):
        pass
    assert_equal(contents(model), own)
    assert ema.n_averaged == 1


@pytest.mark.skipif(DEVICE.type == "cpu", reason="of a model that goes to the CPU")
def test_swap_of_a_model_that_moves_to_another_device() -> None:
    model = make_model()
    ema = averaged(model)
    own = contents(model)
    with ema.swap(model):
        model.to("cpu")
    moved = contents(model)
    assert_equal({n: t.cpu() for n, t in own.items()}, {n: moved[n] for n in own})


@needs_host_memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_expanded_tensors(dtype: torch.dtype) -> None:
    """Whose elements are one in memory, which torch does not write to."""
    model = make_model(dtype)
    model.register_buffer("wide", torch.ones(2, 1).expand(2, 3))
    ema = EMA(model, 0.5)
    model.wide = torch.full((2, 1), 3.0).expand(2, 3)
    for _ in range(2):
        with ema.swap(model):
            assert torch.equal(model.wide, torch.ones(2, 3))
        assert model.wide.stride() == (1, 0)
        assert torch.equal(model.wide, torch.full((2, 3), 3.0))
    ema.copy_to(model)
    assert torch.equal(model.wide, torch.ones(2, 3))


@needs_host_memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@table("which", {"EMA": "EMA", "FusedEMA": "FusedEMA"})
def test_what_cannot_be_given_back_is_named_and_all_else_is(
    which: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, ema = fused(dtype)
    if which == "EMA":
        ema = averaged(model)  # type: ignore[assignment]
    name = {"EMA": r"2\.bias", "FusedEMA": "parameter 4 of group 0"}[which]
    own, address, write = contents(model), model[2].bias.data_ptr(), swapping.write

    def refuse(target: Tensor, source: Tensor) -> None:
        if target.data_ptr() == address:
            raise RuntimeError("not now")
        write(target, source)

    told = rf"after the block of swap\w*\(\), {name} could not be given back; .*: not now"
    with pytest.raises(RuntimeError, match=told), ema.swap(model):
        monkeypatch.setattr(swapping, "write", refuse)
    monkeypatch.undo()
    left = contents(model)
    assert not torch.equal(left.pop("2.bias"), own.pop("2.bias"))
    assert_equal(left, own)
    with ema.swap(model):  # and it may be entered again
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@table("which", {"EMA": "EMA", "FusedEMA": "FusedEMA"})
def test_what_cannot_be_entered_has_not_been(
    which: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever tensor it is that does not take the average."""
    model, _, ema = fused(dtype)
    if which == "EMA":
        ema = averaged(model)  # type: ignore[assignment]
    own, write = contents(model), swapping.write
    averages = {n: t.clone() for n, t in getattr(ema, "averages", {}).items()}
    for at in range(1, 6):
        calls = itertools.count(1)

        def refuse(target: Tensor, source: Tensor) -> None:
            if next(calls) == at:  # noqa: B023 # called within this round only
                raise RuntimeError("not now")
            write(target, source)

        monkeypatch.setattr(swapping, "write", refuse)
        with pytest.raises(RuntimeError, match=r"^not now$"), ema.swap(model):
            pytest.fail("the block is not entered")
        monkeypatch.undo()
        assert_equal(contents(model), own)
        assert_equal(getattr(ema, "averages", {}), averages)


def small(dtype: torch.dtype) -> tuple[nn.Module, EMA]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).to(dtype)
    model.register_buffer("count", torch.zeros(1))
    model[1].weight.data = model[0].weight.data[:1]
    ema = EMA(model, 0.5)
    for average in ema.averages.values():
        average.fill_(2)
    return model, ema


def state_of(subject: tuple[nn.Module, EMA]) -> dict[str, Tensor]:
    model, ema = subject
    return {
        **{f"model.{n}": t for n, t in contents(model).items()},
        **{n: t.clone() for n, t in ema.averages.items()},
        "counts": torch.tensor([ema.n_averaged, ema._calls, ema._swapped]),
    }


def swap_once(subject: tuple[nn.Module, EMA]) -> None:
    with subject[1].swap(subject[0]):
        pass


def load_zeros(subject: tuple[nn.Module, EMA]) -> None:
    subject[1].load_state_dict({n: t * 0 for n, t in subject[1].state_dict().items()})


@needs_host_memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@table(
    "act",
    {
        "swap": swap_once,
        "copy_to": lambda subject: subject[1].copy_to(subject[0]),
        "load_state_dict": load_zeros,
    },
)
def test_all_is_whole_wherever_it_is_interrupted(
    act: Callable[[tuple[nn.Module, EMA]], None], dtype: torch.dtype
) -> None:
    before, subject = state_of(small(dtype)), small(dtype)
    act(subject)
    after = state_of(subject)
    for subject in interrupted_everywhere(lambda: small(dtype), act):
        now = state_of(subject)
        changed = any(not torch.equal(now[n], before[n]) for n in now)
        assert_equal(now, after if changed else before)


@needs_host_memory
def test_the_fused_swap_is_whole_wherever_it_is_interrupted() -> None:
    def make() -> tuple[nn.Module, FusedEMA]:
        torch.manual_seed(0)
        model = nn.Linear(2, 1, bias=False)
        model.register_buffer("count", torch.zeros(1))
        optimizer = fusedopt.SGD(model.parameters(), lr=0.1, ema_decay=0.5)
        model.weight.grad = torch.ones(1, 2)
        optimizer.step()
        return model, FusedEMA(optimizer, model)

    def act(subject: tuple[nn.Module, FusedEMA]) -> None:
        with subject[1].swap(subject[0]):
            subject[0].count.add_(1)

    own = contents(make()[0])
    for model, ema in interrupted_everywhere(make, act):
        assert_equal(contents(model), own)
        assert not vars(ema._optimizer).get("_swapped")


# --- Checkpoints of averages ----------------------------------------------------------------------


@table(
    "make",
    {
        "EMA": lambda model: EMA(model, 0.9, update_every=3, start=2),
        "SWA": lambda model: SWA(model, every=3, start=2),
    },
)
@pytest.mark.parametrize("at", range(9))
def test_resumes_to_the_bit(make: Callable[[nn.Module], WeightAverage], at: int) -> None:
    model = make_model(torch.bfloat16)
    average = make(model)
    for step in range(12):
        if step == at:
            state = through_a_file(average.state_dict())
            average = make(make_model(torch.bfloat16))
            average.load_state_dict(state)
        disturb(model, step)
        average.update(model)
    model = make_model(torch.bfloat16)
    straight = make(model)
    for step in range(12):
        disturb(model, step)
        straight.update(model)
    saved, expected = average.state_dict(), straight.state_dict()
    assert_equal(saved, expected)
    assert saved._metadata == expected._metadata


def test_checkpoints_of_averaged_model_load_in_both_directions() -> None:
    model = make_model()
    ema = EMA(model, 0.5, warmup=False)
    stock = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    stock.update_parameters(model)
    for step in range(3):
        disturb(model, step)
        ema.update(model)
        stock.update_parameters(model)
    saved = stock.state_dict()
    assert list(ema.state_dict()) == list(saved)
    torch.testing.assert_close(
        {n: t for n, t in ema.state_dict().items() if n != "n_averaged"},
        {n: t for n, t in saved.items() if n != "n_averaged"},
    )
    from_stock = EMA(make_model(), 0.5, warmup=False)
    from_stock.load_state_dict(through_a_file(saved))
    assert from_stock.n_averaged == 4
    from_ours = AveragedModel(make_model(), multi_avg_fn=get_ema_multi_avg_fn(0.5))
    assert not any(from_ours.load_state_dict(through_a_file(ema.state_dict())))
    disturb(model, 3)
    for average in (ema, from_stock):
        average.update(model)
    for average in (stock, from_ours):
        average.update_parameters(model)
    for state in (from_stock.state_dict(), from_ours.state_dict(), stock.state_dict()):
        del state["n_averaged"]
        torch.testing.assert_close({n: ema.state_dict()[n] for n in state}, dict(state))


def test_stock_swa_goes_on_with_ours() -> None:
    """An equal mean needs the number of models; both count alike."""
    model = make_model()
    swa, stock = SWA(model, start=0), AveragedModel(model)
    for step in range(6):
        if step == 3:
            state = swa.state_dict()
            swa.load_state_dict(stock.state_dict())
            stock.load_state_dict(state)
        disturb(model, step)
        swa.update(model)
        stock.update_parameters(model)
    states = dict(swa.state_dict()), dict(stock.state_dict())
    torch.testing.assert_close(*states, check_device=False)  # n_averaged: ours is on the CPU


def test_loading_copies_and_checks() -> None:
    model = make_model(torch.bfloat16)
    ema = EMA(model)
    state = ema.state_dict()
    saved = copy.deepcopy(state)
    other = EMA(model)
    other.load_state_dict(state)
    disturb(model, 0)
    other.update(model)
    assert_equal(state, saved)
    with pytest.raises(ValueError, match="no 'n_averaged'"):
        ema.load_state_dict(model.state_dict())
    with pytest.raises(TypeError, match=r"'0\.bias', which is no tensor: 'gone'"):
        ema.load_state_dict({**saved, "module.0.bias": "gone"})
    plain = OrderedDict(saved)  # a dict that has lost what is beside its entries
    ema.load_state_dict(dict(plain))
    assert ema.n_averaged == 0


@table(
    "row",
    {
        "shape": ({"module.mask": torch.zeros(3)}, ValueError, r"'mask' in the shape \(3,\)"),
        "no tensor": ({"module.mask": [True]}, TypeError, "'mask', which is no tensor"),
        "no data": ({"module.mask": torch.zeros(2, device="meta")}, ValueError, "without values"),
        "count": ({"n_averaged": torch.tensor(1.5)}, TypeError, r"\['n_averaged'\] is not an int"),
        "several": ({"n_averaged": torch.ones(2).int()}, TypeError, r"\['n_averaged'\] is not"),
        "negative": ({"n_averaged": -1}, ValueError, r"\['n_averaged'\] must be at least 0: -1"),
    },
)
def test_a_refused_state_changes_nothing(row: tuple[dict[str, Any], type[Exception], str]) -> None:
    entries, error, message = row
    model = make_model()
    ema = averaged(model)
    other = EMA(model, 0.5)
    before = copy.deepcopy(other.averages)
    with pytest.raises(error, match=message):
        other.load_state_dict({**ema.state_dict(), **entries})
    assert_equal(other.averages, before)
    assert (other.n_averaged, other._calls) == (0, 0)


def test_an_average_of_another_kind() -> None:
    """To know it takes what torch's layout has no place for: without the metadata either loads."""
    model = make_model()
    for one, other in (
        (EMA(model), SWA(model, start=0)),
        (SWA(model, start=0), EMA(model)),
    ):
        one.update(model)
        state, before = through_a_file(one.state_dict()), other.state_dict()
        with pytest.raises(ValueError, match=r"average of the kind (EMA|SWA), not (SWA|EMA)$"):
            other.load_state_dict(state)
        assert_equal(other.state_dict(), before)
        assert other.n_averaged == 0
        other.load_state_dict(dict(state))
        assert other.n_averaged == 1


# --- The average within the step ------------------------------------------------------------------


def fused(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, fusedopt.AdamW, FusedEMA]:
    model = make_model(dtype)
    frozen = model[0].weight.requires_grad_(False)
    params = [p for p in model.parameters() if p is not frozen]
    optimizer = fusedopt.AdamW(params, lr=0.1, ema_decay=0.5)
    for step in range(3):
        optimizer.zero_grad()
        torch.manual_seed(step)
        model(torch.randn(8, 4, dtype=dtype)).square().sum().backward()
        optimizer.step()
    return model, optimizer, FusedEMA(optimizer, model)


@needs_running_statistics
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_ema_is_used_like_an_ema(dtype: torch.dtype) -> None:
    model, optimizer, ema = fused(dtype)
    own = contents(model)
    expected = {
        name: optimizer.state[p]["ema"].to(dtype) if p.requires_grad else p.detach()
        for name, p in model.named_parameters()
    } | {name: buffer.clone() for name, buffer in model.named_buffers()}
    target = copy.deepcopy(model)
    disturb(target, 0)
    ema.copy_to(target)
    assert_equal(contents(target), expected)

    def evaluate(fails: bool) -> None:
        with ema.swap(model):
            assert_equal(contents(model), expected)
            model(torch.randn(8, 4, dtype=dtype))  # in train mode: writes to buffers
            assert not torch.equal(model[1].running_mean, expected["1.running_mean"])
            if fails:
                raise ZeroDivisionError

    evaluate(False)
    with pytest.raises(ZeroDivisionError):
        evaluate(True)
    assert_equal(contents(model), own)


def test_fused_ema_refuses() -> None:
    model, optimizer, ema = fused()
    other = copy.deepcopy(model)
    with pytest.raises(ValueError, match="not the one"), ema.swap(other):
        pass
    with pytest.raises(ValueError, match=r"has no '0\.weight'"):
        ema.copy_to(nn.Linear(2, 2))
    with ema.swap(model), pytest.raises(RuntimeError, match="swap_ema"), ema.swap(model):
        pass
    with ema.swap(model), pytest.raises(RuntimeError, match="swap_ema"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"'0\.bias', which optimizer has not"):
        FusedEMA(optimizer, other)
    with pytest.raises(TypeError, match="none of fusedopt's: SGD"):
        FusedEMA(torch.optim.SGD(model.parameters(), lr=0.1), model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model is not a"):
        FusedEMA(optimizer, "model")  # type: ignore[arg-type]
    optimizer.ema_decay = None
    for use in (ema.copy_to, lambda m: ema.swap(m).__enter__()):
        with pytest.raises(RuntimeError, match="ema_decay"):
            use(model)
    with pytest.raises(ValueError, match="keeps no average"):
        FusedEMA(optimizer, model)
