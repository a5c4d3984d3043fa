"""The range test leaves no trace, sees what there is to see, and invents nothing."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from averages import interrupted_everywhere
from helpers import CLASSES, DEVICE, every_class, table
from torch import Tensor

import fusedopt
from fusedopt import trial
from fusedopt.range_test import LRFinderResult, lr_range_test

cpu_only = pytest.mark.skipif(DEVICE.type != "cpu", reason="of numbers, which are the CPU's")


class Net(torch.nn.Module):
    """Has all that a run changes: running statistics, a mode, a count, random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(6, 16)
        self.norm = torch.nn.BatchNorm1d(16)
        self.last = torch.nn.Linear(16, 4)
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.register_buffer("wide", torch.ones(1).expand(4))
        self.seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        x = torch.relu(self.norm(self.first(x)))
        if self.training:
            x = x * (1 + 0.1 * torch.randn_like(x)) * (1 + 0.01 * random.random())
            x = x + 0.01 * float(np.random.rand())
        return self.last(x) * self.wide


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Setting:
    """A model in training, whose every next number depends on all of its state."""

    def __init__(self, make: Callable[[Any], Any], seed: int = 0) -> None:
        seed_all(seed)
        self.model = Net()
        self.optimizer = make(self.model)
        self.batches = [(torch.randn(8, 6), torch.randint(0, 4, (8,))) for _ in range(7)]

    def closure(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def train(self, steps: int, seed: int = 1) -> list[float]:
        seed_all(seed)
        losses = []
        for i in range(steps):
            self.optimizer.zero_grad()
            loss = self.closure(self.batches[i % 7])
            loss.backward()
            self.optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def sweep(self, **options: Any) -> LRFinderResult:
        options = {
            "closure": self.closure,
            "batches": self.batches,
            "stateful": (self.model,),
            "num_iter": 12,
            **options,
        }
        return lr_range_test(optimizer=self.optimizer, **options)


def everything(setting: Setting) -> dict[str, Any]:
    """All that must not change, as bytes and plain values."""
    model, optimizer = setting.model, setting.optimizer
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors = {name: tensor for name, tensor in named}
    for i, param in enumerate(model.parameters()):
        if param.grad is not None:
            tensors[f"grad {i}"] = param.grad
        for name, value in optimizer.state.get(param, {}).items():
            if isinstance(value, Tensor):
                tensors[f"state {i} {name}"] = value
    found: dict[str, Any] = {
        name: (id(tensor), tensor.dtype, tensor.detach().cpu().contiguous().view(-1).tolist())
        for name, tensor in tensors.items()
    }
    found["groups"] = [
        {n: (id(v), float(v)) if isinstance(v, Tensor) else v for n, v in g.items()}
        for g in optimizer.param_groups
    ]
    found["counts"] = (model.calls, model.training, model.norm.training)
    found["random"] = (random.getstate(), torch.get_rng_state().tolist())
    found["numpy"] = [str(part) for part in np.random.get_state()]
    if isinstance(optimizer, fusedopt.AdamW):
        found["told"] = (int(optimizer.skipped_steps), str(float(optimizer.grad_norm)))
    return found


def adamw(**options: Any) -> Callable[[Any], Any]:
    return lambda model: fusedopt.AdamW(model.parameters(), **{"lr": 0.01, **options})


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    **{case.name: lambda m, case=case: case.ours(m.parameters()) for case in CLASSES},
    "8 bits": adamw(state_dtype=torch.uint8),
    "average and norm": adamw(ema_decay=0.9, max_grad_norm=1e-3),
    "skips": adamw(nonfinite="skip"),
    "stock AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, foreach=False),
    "stock SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9, foreach=False),
    "tensor lr": lambda m: torch.optim.Adam(
        m.parameters(), lr=torch.tensor(0.01, device="cpu"), foreach=False
    ),
}


@pytest.mark.parametrize("steps", [0, 5], ids=["fresh", "in training"])
@table("make", OPTIMIZERS)
def test_nothing_remains(make: Callable[[Any], Any], steps: int) -> None:
    """The same objects with the same bits, twice; and training goes on as if without it."""
    tested, other = Setting(make), Setting(make)
    tested.train(steps)
    other.train(steps)
    before = everything(tested)
    for _ in range(2):
        result = tested.sweep(smoothing=0.5)
        assert len(result.lrs) > 5
        assert everything(tested) == before
    assert tested.train(4, seed=2) == other.train(4, seed=2)
    ours, theirs = tested.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [0, 3])
@table("make", {n: OPTIMIZERS[n] for n in ("8 bits", "average and norm", "stock AdamW")})
def test_nothing_remains_of_a_failure(
    make: Callable[[Any], Any], at: int, error: type[BaseException]
) -> None:
    setting = Setting(make)
    setting.train(3)
    setting.model.eval()
    setting.model.norm.train()
    before = everything(setting)
    calls = itertools.count()

    def failing(batch: Any) -> Tensor:
        setting.model.train()
        loss = setting.closure(batch)
        loss.backward(retain_graph=True)
        if next(calls) == at:
            if hasattr(setting.optimizer, "accumulate"):
                setting.optimizer.accumulate()
            raise error
        return loss

    with pytest.raises(error):
        setting.sweep(closure=failing)
    assert everything(setting) == before
    setting.sweep()  # no window is open
    assert everything(setting) == before


def test_gradients_are_set_aside() -> None:
    setting = Setting(adamw())
    setting.closure(setting.batches[0]).backward()
    grads = [p.grad for p in setting.model.parameters()]
    before = everything(setting)
    setting.sweep()
    assert all(p.grad is g for p, g in zip(setting.model.parameters(), grads, strict=True))
    assert everything(setting) == before


def test_memory_stays_and_zero_grad_in_place_finds_no_gradients() -> None:
    class Zeroing(torch.optim.SGD):
        def zero_grad(self, set_to_none: bool = True) -> None:
            super().zero_grad(set_to_none=False)

    setting = Setting(lambda model: Zeroing(model.parameters(), lr=0.01, foreach=False))
    setting.closure(setting.batches[0]).backward()
    places = [p.data_ptr() for p in setting.model.parameters()]
    before = everything(setting)
    setting.sweep()
    assert [p.data_ptr() for p in setting.model.parameters()] == places
    assert everything(setting) == before


def test_whoever_replaces_things_gets_them_back() -> None:
    setting = Setting(adamw())
    setting.train(2)
    before = everything(setting)
    model, optimizer = setting.model, setting.optimizer

    def closure(batch: Any) -> Tensor:
        setting.closure(batch)
        model.last.bias = torch.nn.Parameter(torch.zeros(4))
        model.first.weight.data = torch.zeros(16, 6, dtype=torch.float32)
        model.seen = torch.zeros(3)
        optimizer.param_groups[0]["betas"] = (0.0, 0.0)
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
        optimizer.l1 = 0.5
        raise StopAsyncIteration

    with pytest.raises(StopAsyncIteration):
        setting.sweep(closure=closure)
    assert len(optimizer.param_groups) == 1
    assert optimizer.l1 == 0.0
    assert everything(setting) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="of CUDA's generators")
def test_cuda_generators_are_restored() -> None:
    setting = Setting(adamw())
    torch.rand(1, device="cuda")
    before = torch.cuda.get_rng_state()

    def closure(batch: Any) -> Tensor:
        torch.rand(9, device="cuda")
        return setting.closure(batch)

    setting.sweep(closure=closure)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_an_open_window_is_refused() -> None:
    setting = Setting(adamw())
    setting.closure(setting.batches[0]).backward()
    setting.optimizer.accumulate()
    before = everything(setting)
    with pytest.raises(RuntimeError, match=r"accumulate\(\) has gradients that no step"):
        setting.sweep()
    assert everything(setting) == before
    setting.optimizer.step()
    setting.sweep()


def test_other_objects_are_restored() -> None:
    setting = Setting(adamw())
    generator = torch.Generator("cpu").manual_seed(3)
    average = torch.optim.swa_utils.AveragedModel(setting.model.first)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(setting.optimizer, 0.9)
    setting.train(1)
    scheduler.step()
    before = everything(setting), generator.get_state(), average.state_dict(), scheduler.last_epoch
    copies = [value.clone() for value in before[2].values()]

    def closure(batch: Any) -> Tensor:
        torch.rand(3, generator=generator, device="cpu")
        average.update_parameters(setting.model.first)
        scheduler.last_epoch += 1
        return setting.closure(batch)

    setting.sweep(closure=closure, stateful=(setting.model, generator, average, scheduler))
    assert everything(setting) == before[0]
    assert torch.equal(generator.get_state(), before[1])
    assert all(map(torch.equal, copies, average.state_dict().values()))
    assert scheduler.last_epoch == before[3] == 1


def test_a_scheduler_finds_its_rates_again() -> None:
    """The sweep is of the base rates' ratio, also where a warmup has come to zero."""

    def make(model: Any) -> Any:
        groups = [{"params": model.first.parameters()}, {"params": model.last.parameters()}]
        groups[1]["lr"] = 0.03
        return fusedopt.SGD(groups, lr=0.01)

    setting = Setting(make)
    optimizer = setting.optimizer
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda t: 0.0, lambda t: 0.3])
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.009]
    rates = []

    def closure(batch: Any) -> Tensor:
        rates.append([group["lr"] for group in optimizer.param_groups])
        return setting.closure(batch)

    result = setting.sweep(closure=closure, start_lr=1e-4, end_lr=1e-2)
    assert [first for first, _ in rates] == result.lrs
    assert all(second == pytest.approx(3 * first) for first, second in rates)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.009]
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [0.0, 0.009]


def test_scaler() -> None:
    setting = Setting(adamw())
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=8.0, growth_interval=2)
    before = everything(setting), scaler.state_dict()
    plain = setting.sweep(end_lr=0.1)
    scaled = setting.sweep(end_lr=0.1, scaler=scaler)
    assert scaled.losses == pytest.approx(plain.losses, rel=1e-4)
    assert (everything(setting), scaler.state_dict()) == before
    assert scaler._scale is None  # not even made

    def failing(batch: Any) -> Tensor:  # between scale() and update()
        scaler.scale(setting.closure(batch)).backward()
        scaler.unscale_(setting.optimizer)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        setting.sweep(closure=failing, scaler=scaler)
    assert setting.sweep(end_lr=0.1, scaler=scaler).losses == scaled.losses


# The sweep ----------------------------------------------------------------------------------------


def parabola(lr: Any = 0.1, start: float = 2.0) -> tuple[Tensor, torch.optim.Optimizer]:
    """y = 4 x^2 from 2, where each step multiplies x by 1 - 8 lr."""
    x = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64, device="cpu"))
    return x, torch.optim.SGD([x], lr=lr, foreach=False)


def sweep(x: Tensor, optimizer: Any, **options: Any) -> LRFinderResult:
    options = {"batches": [None], "stateful": (), "num_iter": 11, **options}
    return lr_range_test(lambda batch: 4 * x * x, optimizer=optimizer, **options)


@cpu_only
@pytest.mark.parametrize("mode", ["exponential", "linear"])
def test_rates_and_losses_are_those_of_the_formula(mode: str) -> None:
    x, optimizer = parabola()
    b = 0.75
    result = sweep(x, optimizer, start_lr=1e-3, end_lr=1e-1, mode=mode, smoothing=b)
    if mode == "linear":
        lrs = [1e-3 + (1e-1 - 1e-3) * i / 10 for i in range(11)]
    else:
        lrs = [1e-3 * 100 ** (i / 10) for i in range(11)]
    assert result.lrs == pytest.approx(lrs)
    place, losses = 2.0, []
    for lr in lrs:
        losses.append(4 * place * place)
        place *= 1 - 8 * lr
    assert result.losses == pytest.approx(losses)
    for t, value in enumerate(result.smoothed, 1):
        terms = [b ** (t - k) * losses[k - 1] for k in range(1, t + 1)]
        assert value == pytest.approx((1 - b) * sum(terms) / (1 - b**t))
    assert not result.diverged
    assert result.reason == "all 11 iterations were done"
    assert x == 2.0


@cpu_only
def test_a_tensor_as_rate_is_written_into() -> None:
    lr = torch.tensor(0.1, dtype=torch.float64, device="cpu")
    x, optimizer = parabola(lr)
    seen = []

    def closure(batch: Any) -> Tensor:
        assert optimizer.param_groups[0]["lr"] is lr
        seen.append(float(lr))
        return 4 * x * x

    result = lr_range_test(closure, [None], optimizer, stateful=(), num_iter=10, end_lr=1e-3)
    assert seen == pytest.approx(result.lrs)
    assert float(lr) == 0.1


@cpu_only
def test_data_starts_again_and_steps_take_several() -> None:
    x, optimizer = parabola()
    seen = []

    def closure(batch: int) -> Tensor:
        seen.append(batch)
        return (batch + 1) * x * x

    result = lr_range_test(
        closure, range(4), optimizer, stateful=(), num_iter=10, accumulate=3, end_lr=1e-6
    )
    assert seen == [i % 4 for i in range(30)]
    assert result.losses[0] == pytest.approx((1 + 2 + 3) * 4 / 3)
    x0 = 2.0 * (1 - 2 * 1e-7 * 2)  # along the mean of the three
    assert result.losses[1] == pytest.approx((4 + 1 + 2) * x0**2 / 3, rel=1e-12)


@cpu_only
def test_validation_tells_instead() -> None:
    setting = Setting(adamw())
    values = iter(range(100, 0, -1))
    modes = []

    def validate() -> float:
        assert not torch.is_grad_enabled()
        modes.append(setting.model.training)
        setting.model.eval()
        return float(next(values))

    result = setting.sweep(validate=validate)
    assert result.losses == [100.0 - i for i in range(12)]
    assert modes == [True] * 12


@cpu_only
def test_divergence_ends_the_sweep() -> None:
    x, optimizer = parabola()
    result = sweep(x, optimizer, num_iter=100, smoothing=0.0, start_lr=1e-3)
    assert result.diverged
    assert 0.25 < result.lrs[-1] < 2  # beyond 0.25 the parabola's steps grow, from nearly 0
    assert "the smoothed loss rose to" in result.reason
    assert all(map(math.isfinite, result.losses))
    to_the_end = sweep(x, optimizer, smoothing=0.0, start_lr=1e-3, diverge_factor=None)
    assert not to_the_end.diverged
    assert len(to_the_end.losses) == 11


@cpu_only
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_no_numbers_end_the_sweep(bad: float) -> None:
    x, optimizer = parabola()
    calls = itertools.count(1)

    def closure(batch: Any) -> Tensor:
        return 4 * x * x if next(calls) < 8 else x * bad

    result = lr_range_test(closure, [None], optimizer, stateful=(), num_iter=10, end_lr=1e-3)
    assert result.diverged
    assert len(result.lrs) == len(result.losses) == len(result.smoothed) == 7
    assert f"the loss was {bad} at lr" in result.reason
    assert x == 2.0
    with pytest.raises(RuntimeError, match=f"the first loss is {bad}: there is nothing to test"):
        lr_range_test(lambda batch: x * bad, [None], optimizer, stateful=())


@cpu_only
@pytest.mark.parametrize("offset", [0.0, -16.0, -100.0])
def test_a_loss_near_zero_or_below_is_not_divergence(offset: float) -> None:
    """Four times a loss of nearly nothing is still nothing, and of -16 it is less."""
    x, optimizer = parabola()
    signs = itertools.cycle([0.0, 0.01])
    result = lr_range_test(
        lambda batch: 4 * x * x + offset + next(signs),
        [None],
        optimizer,
        stateful=(),
        num_iter=50,
        smoothing=0.0,
        start_lr=0.01,
        end_lr=0.2,
    )
    assert not result.diverged
    assert result.losses[-1] == pytest.approx(offset, abs=0.02)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "closure": ({"closure": 3}, TypeError, "closure is not callable: 3"),
    "validate": ({"validate": 3}, TypeError, "validate is not callable: 3"),
    "batches": ({"batches": 3}, TypeError, "batches is not iterable: 3"),
    "no batches": ({"batches": []}, ValueError, "batches is empty"),
    "iterator": ({"batches": iter([1, 2])}, ValueError, "batches ended after 2"),
    "optimizer": ({"optimizer": "SGD"}, TypeError, "optimizer is not a torch.*: 'SGD'"),
    "module": ({"stateful": torch.nn.Identity()}, TypeError, "stateful is not a tuple.*Identity"),
    "stateless": ({"stateful": (1,)}, TypeError, r"stateful\[0\] has no state_dict.*int"),
    "scaler": ({"scaler": 2.0}, TypeError, "scaler is not a GradScaler: 2.0"),
    "start_lr": ({"start_lr": 0}, ValueError, "start_lr must be positive: 0"),
    "inf": ({"start_lr": math.inf}, ValueError, "start_lr must be finite: inf"),
    "nan": ({"start_lr": math.nan}, ValueError, "start_lr must be positive: nan"),
    "text": ({"start_lr": "1"}, TypeError, "start_lr is not a number: '1'"),
    "order": ({"start_lr": 1, "end_lr": 1}, ValueError, "end_lr must be .*start_lr=1: 1"),
    "end_lr": ({"end_lr": math.inf}, ValueError, "end_lr must be .*: inf"),
    "num_iter": ({"num_iter": 9}, ValueError, "num_iter must be at least 10: 9"),
    "half num_iter": ({"num_iter": 10.5}, TypeError, "num_iter is not an integer: 10.5"),
    "mode": ({"mode": "log"}, ValueError, "mode must be one of 'exponential', 'linear': 'log'"),
    "smoothing": ({"smoothing": 1}, ValueError, "smoothing must be .*: 1"),
    "factor": ({"diverge_factor": 1.0}, ValueError, "diverge_factor must be above 1.*: 1.0"),
    "accumulate": ({"accumulate": 0}, ValueError, "accumulate must be at least 1: 0"),
    "bool": ({"accumulate": True}, TypeError, "accumulate is not an integer: True"),
    "no loss": ({"closure": lambda b: 1.0}, TypeError, r"closure\(batch\) must return.*: 1.0"),
    "no graph": (
        {"closure": lambda b: torch.zeros((), device="cpu")},
        ValueError,
        r"closure\(batch\) must return a loss that backward",
    ),
}


@cpu_only
@table("wrong", WRONG)
def test_wrong_arguments(wrong: Any) -> None:
    options, error, message = wrong
    x, optimizer = parabola()
    options = {"closure": lambda b: 4 * x * x, "batches": [None], "stateful": (), **options}
    with pytest.raises(error, match=message):
        lr_range_test(**{"optimizer": optimizer, **options})
    assert x == 2.0
    assert optimizer.param_groups[0]["lr"] == 0.1


@cpu_only
def test_a_first_rate_of_zero_has_no_ratios() -> None:
    x, optimizer = parabola(0.0)
    with pytest.raises(ValueError, match=r"the first group's lr must be positive.*: 0\.0"):
        sweep(x, optimizer)


# Suggestions --------------------------------------------------------------------------------------


def result(curve: Callable[[float], float], *, diverged: bool = False, n: int = 100) -> Any:
    """Of a sweep from 1e-5 to 10 whose losses are a function of the part that is over."""
    lrs = [1e-5 * 1e6 ** (i / (n - 1)) for i in range(n)]
    losses = [curve(i / (n - 1)) for i in range(n)]
    return LRFinderResult(lrs, losses, losses, diverged, "made up")


def bowl(x: float) -> float:
    """Flat to 0.4, down to 0.8 along half a cosine, and up again."""
    if x < 0.4:
        return 2.0 + 0.01 * x
    if x < 0.8:
        return 1.0 + 1.004 * (1 + math.cos(math.pi * (x - 0.4) / 0.4)) / 2
    return 1.0 + 50 * (x - 0.8) ** 2


def test_rules() -> None:
    found = result(bowl)
    at = {rule: found.suggest(rule) for rule in ("valley", "minimum", "steepest")}
    assert at["valley"] == found.suggest()
    bottom = 1e-5 * 1e6**0.8
    middle = 1e-5 * 1e6**0.6
    assert at["minimum"] == pytest.approx(bottom / 10, rel=0.1)
    assert at["steepest"] == pytest.approx(middle, rel=0.15)
    assert at["valley"] == pytest.approx(middle, rel=0.15)
    assert "the middle of the descent" in found.explain()
    assert "where the loss is lowest" in found.explain("minimum")
    assert "falls fastest" in found.explain("steepest")


@table(
    "row",
    {
        "flat": (lambda x: 2.0, "no descent"),
        "rising": (lambda x: 2.0 + x, "no descent"),
        "still falling": (lambda x: 2.0 - x, "still falls at the end, at lr 10: sweep to a larger"),
        "fell before": (lambda x: max(0.06 - x, 0.1 * x), "only rises from lr"),
    },
)
@pytest.mark.parametrize("rule", ["valley", "minimum", "steepest"])
def test_where_nothing_is_to_be_seen_nothing_is_suggested(row: Any, rule: str) -> None:
    curve, reason = row
    assert result(curve).suggest(rule) is None
    assert reason in result(curve).explain(rule)


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_descent(seed: int) -> None:
    rng = random.Random(seed)
    found = result(lambda x: rng.gauss(2.0, 0.3), diverged=True)
    assert found.suggest() is None
    assert "no descent" in found.explain()


def test_too_few_points() -> None:
    few = result(lambda x: 2 - 2 * x if x < 0.8 else 5, n=5)
    assert few.suggest(skip_start=0) == few.lrs[1]
    assert few.suggest(skip_start=0.2) is None
    assert "only 4 usable points of the 5" in few.explain(skip_start=0.2)
    assert "only 0 usable" in LRFinderResult([], [], [], True, "").explain()
    assert result(bowl).suggest(skip_end=0.25) is None  # what is left still falls


@table(
    "wrong",
    {
        "rule": ({"rule": "best"}, ValueError, "rule must be one of 'valley', .*: 'best'"),
        "start": ({"skip_start": 1}, ValueError, "skip_start must be .*: 1"),
        "end": ({"skip_end": -0.1}, ValueError, "skip_end must be .*: -0.1"),
        "both": ({"skip_start": 0.5, "skip_end": 0.5}, ValueError, "leave no points"),
        "text": ({"skip_end": "a"}, TypeError, "skip_end is not a number: 'a'"),
    },
)
def test_wrong_questions(wrong: Any) -> None:
    options, error, message = wrong
    with pytest.raises(error, match=message):
        result(bowl).suggest(**options)


def test_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    ax = Figure().add_subplot()
    assert result(bowl).plot(ax) is ax
    assert ax.get_xscale() == "log"
    assert [line.get_label().split(":")[0] for line in ax.lines] == ["loss", "smoothed", "valley"]
    with matplotlib.rc_context({"backend": "Agg"}):
        from matplotlib import pyplot

        made = result(lambda x: 2.0).plot()
        assert len(made.lines) == 2
        pyplot.close(made.figure)


# A problem with noise: ten classes of which a part cannot be told, in batches of 16.


def task() -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device="cpu")
    x = draw(512, 20)
    scores = x @ draw(20, 10)
    return x.to(DEVICE), (scores + 2 * draw(512, 10)).argmax(1).to(DEVICE)


def learner(seed: int, make: Callable[..., Any], lr: float) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    return model, make(model.parameters(), lr=lr)


def minibatches(seed: int, number: int) -> list[tuple[Tensor, Tensor]]:
    x, y = task()
    generator = torch.Generator("cpu").manual_seed(seed)
    picks = [torch.randint(0, 512, (16,), generator=generator, device="cpu") for _ in range(number)]
    return [(x[pick], y[pick]) for pick in picks]


def trained_loss(make: Callable[..., Any], lr: float) -> float:
    """The loss over all data after 300 steps at a constant rate."""
    model, optimizer = learner(100, make, lr)
    for x, y in minibatches(100, 300):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    x, y = task()
    return float(torch.nn.functional.cross_entropy(model(x), y).detach())


@cpu_only
@table(
    "make",
    {
        "SGD": lambda p, lr: fusedopt.SGD(p, lr=lr, momentum=0.9),
        "AdamW": lambda p, lr: fusedopt.AdamW(p, lr=lr),
    },
)
def test_the_suggestion_trains_well(make: Callable[..., Any]) -> None:
    """Within a factor of 6 of the best constant rate of a grid, and 1.5 times its loss."""
    grid = {lr: trained_loss(make, lr) for lr in (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1)}
    best = min(grid, key=grid.__getitem__)
    assert max(grid.values()) > 4 * grid[best]  # the choice matters
    for seed in range(4):
        model, optimizer = learner(seed, make, 1e-3)

        def closure(batch: Any, model: Any = model) -> Tensor:
            return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

        found = lr_range_test(
            closure, minibatches(seed, 100), optimizer, stateful=(model,), start_lr=1e-5
        )
        suggestion = found.suggest()
        assert found.diverged
        assert suggestion is not None
        assert best / 6 < suggestion < best * 6
        assert trained_loss(make, suggestion) < 1.5 * grid[best]


@every_class
def test_every_class_can_be_swept(case: Any) -> None:
    setting = Setting(lambda model: case.ours(model.parameters()))
    assert len(setting.sweep(end_lr=1e-3).lrs) == 12


class Stubborn:
    """Does not take its state back."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise self.error


@table("error", {"error": ValueError("no, thanks"), "Ctrl-C": KeyboardInterrupt("no, thanks")})
def test_one_that_cannot_be_restored_does_not_keep_the_others(error: BaseException) -> None:
    setting = Setting(adamw())
    setting.train(2)
    counts = torch.optim.lr_scheduler.LambdaLR(setting.optimizer, lambda step: 1.0)
    before = everything(setting)

    def closure(batch: Any) -> Tensor:
        counts.last_epoch = 7
        return setting.closure(batch)

    with pytest.raises(type(error), match="no, thanks"):
        setting.sweep(closure=closure, stateful=(setting.model, Stubborn(error), counts))
    assert everything(setting) == before
    assert counts.last_epoch == 0


def test_an_interrupt_of_the_restoring_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(adamw())
    setting.train(2)
    before = everything(setting)
    real, calls = trial._overwrite, itertools.count()

    def overwrite(*args: Any) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(trial, "_overwrite", overwrite)
    with pytest.raises(KeyboardInterrupt):
        setting.sweep()
    assert everything(setting) == before


@cpu_only
def test_nothing_remains_wherever_it_is_interrupted() -> None:
    """Entering and leaving."""

    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.Linear(1, 1)
        torch.nn.init.ones_(model.weight)
        model(torch.ones(1, 1)).sum().backward()
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def act(subject: tuple[torch.nn.Module, torch.optim.Optimizer]) -> None:
        model, optimizer = subject
        with trial.trial(optimizer, (model,)):
            model(torch.ones(1, 1)).sum().backward()
            optimizer.step()
            model.eval()

    for model, optimizer in interrupted_everywhere(make, act):
        assert model.weight.item() == 1
        assert model.weight.grad.item() == 1
        assert model.training
        assert not optimizer.state


def test_state_that_belongs_to_no_parameter() -> None:
    for make in (OPTIMIZERS["8 bits"], OPTIMIZERS["stock SGD"]):
        setting = Setting(make)
        setting.train(2)
        counts = {"grad_count": "one"}
        setting.optimizer.state["epoch"] = 1
        setting.optimizer.state["counts"] = counts
        setting.optimizer.state["seen"] = torch.ones(2)
        before = everything(setting)

        def closure(batch: Any, setting: Setting = setting) -> Tensor:
            setting.optimizer.state["epoch"] = 2
            setting.optimizer.state["seen"].add_(1)
            counts.clear()  # noqa: B023 # called within this round only
            return setting.closure(batch)

        setting.sweep(closure=closure)
        assert everything(setting) == before
        assert setting.optimizer.state["epoch"] == 1
        assert setting.optimizer.state["seen"].tolist() == [1, 1]
        assert counts == {"grad_count": "one"}


@cpu_only
def test_tensors_get_back_their_memory() -> None:
    """Where they share it, and where inference mode has put others."""
    setting = Setting(OPTIMIZERS["stock AdamW"])
    model = setting.model
    model.last.weight.data = model.first.weight.data.view(-1)[:64].view(4, 16)
    setting.train(2)
    before = everything(setting)
    places = [(t.data_ptr(), t.stride()) for t in (*model.parameters(), *model.buffers())]

    def closure(batch: Any) -> Tensor:
        with torch.inference_mode():
            model.seen = model.seen + 1
            model.wide = torch.ones(4)
        model.first.weight.data = model.first.weight.data.clone()
        model.last.bias.data = torch.zeros(9)
        raise StopAsyncIteration

    with pytest.raises(StopAsyncIteration):
        setting.sweep(closure=closure)
    assert everything(setting) == before
    now = [(t.data_ptr(), t.stride()) for t in (*model.parameters(), *model.buffers())]
    assert now == places
    assert model.wide.stride() == (0,)


def test_containers_get_back_what_was_in_them() -> None:
    setting = Setting(adamw())
    inner = [1]
    held: dict[str, Any] = {
        "set": {1, 2},
        "deque": deque([inner, 2], maxlen=2),
        "array": np.array([[1.0, np.nan]]),
        "objects": np.array([[1], None], dtype=object),
        "fixed": np.ones(2),
    }
    held["fixed"].flags.writeable = False
    setting.model.held = held
    before = str(held)

    def closure(batch: Any) -> Tensor:
        held["set"].add(3)
        inner.append(5)
        held["deque"].append(6)
        held["array"] += 1
        held["array"].resize((2, 1))
        held["objects"][0] = 3
        return setting.closure(batch)

    same = {name: id(value) for name, value in held.items()}
    setting.sweep(closure=closure)
    assert str(setting.model.held) == before
    assert {name: id(value) for name, value in held.items()} == same
