"""The best weights come back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from averages import interrupted_everywhere
from helpers import (
    DEVICE,
    every_class_with,
    make_params,
    needs_host_memory,
    needs_sparse,
    set_grads,
    table,
    through_a_file,
)
from torch import Tensor, nn

import fusedopt
from fusedopt.averaging import EMA
from fusedopt.cases import Case
from fusedopt.stopping import BestWeights, EarlyStopping

STORAGES = ("cpu", "device", "file")
every_storage = pytest.mark.parametrize("storage", STORAGES)


@pytest.fixture
def place(tmp_path: Path) -> Callable[[str], Any]:
    """What to give as storage, by name."""
    return lambda storage: tmp_path / "best.pt" if storage == "file" else storage


class Net(nn.Module):
    """Tied weights, an integer buffer, a frozen weight, an empty one, and state without tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.last = nn.Linear(4, 4)
        self.last.weight = self.first.weight
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Parameter(torch.ones(3, 2).t(), requires_grad=False)
        self.empty = nn.Parameter(torch.ones(0))
        self.extra: Any = {"note": [1, "two"]}

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator("cpu").manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 4, generator=generator, device="cpu").to(DEVICE)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def contents(*items: Any) -> Any:
    return copy.deepcopy([item.state_dict() for item in items])


def same(found: Any, expected: Any) -> bool:
    """To the bit, in nested dicts, lists and tuples."""
    if type(found) is not type(expected):
        return False
    if isinstance(found, Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(found, dict):
        return found.keys() == expected.keys() and all(
            same(v, expected[k]) for k, v in found.items()
        )
    if isinstance(found, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


@every_storage
def test_a_model_comes_back(storage: str, place: Callable[[str], Any]) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    best = BestWeights({"model": model}, storage=place(storage))
    for step in (3, 4):  # the second time into the same memory
        train(model, optimizer, 2, seed=step)
        model.extra["note"][0] = step
        expected = contents(model)
        best.save(step)
    train(model, optimizer, 2)
    model.extra["note"][0] = 9
    assert not same(contents(model), expected)
    assert best.restore() == best.step == 4
    assert same(contents(model), expected)
    assert model.first.weight is model.last.weight
    assert model.norm.num_batches_tracked.dtype == torch.int64
    train(model, optimizer, 2)
    model.extra["note"].append(3)
    best.restore()  # what was kept is not the model's own
    assert same(contents(model), expected)


def test_memory_is_allocated_once_and_tied_weights_once() -> None:
    model = Net()
    best = BestWeights({"model": model})
    best.save(0)
    kept = best.state_dict()["kept"]["model"]
    addresses = {name: t.data_ptr() for name, t in kept.items() if isinstance(t, Tensor)}
    assert addresses["first.weight"] == addresses["last.weight"]
    assert addresses["first.weight"] != model.first.weight.data_ptr()
    best.save(1)
    kept = best.state_dict()["kept"]["model"]
    assert {name: t.data_ptr() for name, t in kept.items() if isinstance(t, Tensor)} == addresses


def test_weights_that_are_no_longer_tied() -> None:
    model = Net()
    best = BestWeights({"model": model})
    best.save(0)
    model.last.weight = nn.Parameter(torch.zeros(4, 4))
    best.save(1)
    expected = contents(model)
    with torch.no_grad():
        model.first.weight.fill_(3)
        model.last.weight.fill_(4)
    best.restore()
    assert same(contents(model), expected)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "8-bit": {"state_dtype": torch.uint8},
    "ema": {"ema_decay": 0.9},
    "all": {"state_dtype": torch.uint8, "ema_decay": 0.9, "max_grad_norm": 1.0, "l1": 1e-4},
    "master": {"weight_precision": "master"},
    "kahan": {"weight_precision": "kahan"},
    "stochastic": {"weight_precision": "stochastic"},
}


@every_class_with(OPTIONS)
def test_our_optimizers_go_on_as_before(case: Case, options: dict[str, Any]) -> None:
    """From the best step on, the same again: parameters, all state, and random bits."""
    dtype = torch.bfloat16 if "weight_precision" in options else torch.float32
    params = nn.ParameterList(make_params([(300, 5), (17,), ()], dtype))
    optimizer = case.ours(params.parameters(), **options)
    best = BestWeights({"model": params, "optimizer": optimizer})
    results = []
    for step in range(4):
        set_grads(list(params), step)
        optimizer.step()
    best.save(3)
    kept = contents(params, optimizer)
    for _ in range(2):
        assert same(contents(params, optimizer), kept)
        for step in range(4, 8):
            set_grads(list(params), step)
            optimizer.step()
        results.append(contents(params, optimizer))
        best.restore()
    assert same(*results)
    assert results[0][0]["0"].ne(kept[0]["0"]).any()


STOCK: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "AdamW-for-loop": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
    "tensor-lr": lambda p: (
        torch.optim.Adam(p, lr=torch.tensor(0.1, device=DEVICE), capturable=False)
        if DEVICE.type == "cpu"
        else torch.optim.Adam(p, lr=0.1)
    ),
}


@every_storage
@table("make", STOCK)
def test_stock_optimizers_go_on_as_before(
    make: Any, storage: str, place: Callable[[str], Any]
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    items = {"model": model, "optimizer": optimizer, "schedule": schedule}
    best = BestWeights(items, storage=place(storage))

    def run(seed: int) -> None:
        generator = torch.Generator("cpu").manual_seed(seed)
        for _ in range(2):
            x = torch.randn(8, 4, generator=generator, device="cpu").to(DEVICE)

            def closure(x: Tensor = x) -> Tensor:
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
            schedule.step()

    run(0)
    best.save(0)
    kept = contents(*items.values())
    results = []
    for _ in range(2):
        assert same(contents(*items.values()), kept)
        run(1)
        results.append(contents(*items.values()))
        best.restore()
    assert same(*results)


@every_storage
def test_the_state_before_the_first_step(storage: str, place: Callable[[str], Any]) -> None:
    """An optimizer makes its state late, and has none again."""
    model = nn.Linear(4, 2)
    optimizer = fusedopt.AdamW(model.parameters())
    best = BestWeights({"model": model, "optimizer": optimizer}, storage=place(storage))
    best.save(0)
    expected = contents(model, optimizer)
    train(model, optimizer, 2)
    best.restore()
    assert same(contents(model, optimizer), expected)
    assert not optimizer.state_dict()["state"]


def test_a_fresh_optimizer_gets_the_state() -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 2)
    best = BestWeights({"optimizer": optimizer})
    best.save(0)
    expected = contents(optimizer)
    optimizer.state.clear()
    best.restore()
    assert same(contents(optimizer), expected)
    train(model, optimizer, 2)  # with tensors of its own
    best.restore()
    assert same(contents(optimizer), expected)


@table("ended", {"normally": None, "error": ZeroDivisionError, "ctrl-c": KeyboardInterrupt})
@every_storage
def test_the_block_restores(
    storage: str, ended: type[BaseException] | None, place: Callable[[str], Any]
) -> None:
    model = nn.Linear(2, 2)

    def block() -> None:
        with BestWeights({"model": model}, storage=place(storage)) as best:
            stopper = EarlyStopping(best=best)
            for value in (3.0, 1.0, 2.0):
                nn.init.constant_(model.weight, value)
                stopper.step(value)
            if ended is not None:
                raise ended

    if ended is None:
        block()
    else:
        with pytest.raises(ended):
            block()
    assert same(model.weight.detach(), torch.full((2, 2), 1.0))


def test_nothing_saved() -> None:
    model = nn.Linear(2, 2)
    best = BestWeights({"model": model})
    with pytest.raises(RuntimeError, match="nothing to restore"):
        best.restore()
    with pytest.raises(RuntimeError, match="nothing to restore"), best:
        pass
    for value, options in ((float("nan"), {}), (5.0, {"start_from": 9})):
        stopper = EarlyStopping(best=best, **options)
        with (
            pytest.raises(RuntimeError, match=r"was nan, .*divergence_threshold.*start_from"),
            best,
        ):
            stopper.step(value)
    with pytest.raises(ZeroDivisionError), best:
        raise ZeroDivisionError


@every_storage
def test_averaged_weights_are_not_kept_as_the_models(
    storage: str, place: Callable[[str], Any]
) -> None:
    """With the optimizer or the average among the objects, it is known who has which."""
    torch.manual_seed(0)
    model = Net()
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.1, ema_decay=0.9)
    ema = EMA(model, decay=0.9)
    swaps: dict[str, Any] = {
        "optimizer": (optimizer, optimizer.swap_ema),
        "ema": (ema, lambda: ema.swap(model)),
    }
    for name, (item, swap) in swaps.items():
        best = BestWeights({"model": model, name: item}, storage=place(storage))
        train(model, optimizer, 3)
        ema.update(model)
        best.save(0)
        kept = contents(model, item)
        train(model, optimizer, 3)
        ema.update(model)
        now = contents(model, item)
        stopper = EarlyStopping(best=best)
        told = rf"no (save|restore)\(\) within swap_ema\(\) or swap\(\) of '{name}'"
        with swap():
            with pytest.raises(RuntimeError, match=told):
                stopper.step(1.0)
            with pytest.raises(RuntimeError, match=told):
                best.restore()
        assert stopper.best_value is None
        assert same(contents(model, item), now)
        assert best.restore() == 0
        assert same(contents(model, item), kept)


def test_the_baseline_is_not_met() -> None:
    model = nn.Linear(2, 2)
    with BestWeights({"model": model}) as best:
        stopper = EarlyStopping(best=best, baseline=0.5, patience=3)
        for value in (3.0, 1.0, 2.0):
            nn.init.constant_(model.weight, value)
            stopper.step(value)
    assert best.step == 1
    assert float(model.weight[0, 0].detach()) == 1.0


def test_an_interrupted_copy_is_not_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights at hand are the best, and what was kept is no longer whole."""
    model = nn.Linear(2, 2)
    best = BestWeights({"model": model})
    best.save(0)
    nn.init.constant_(model.weight, 7.0)

    def interrupt(*_: Any, **__: Any) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    def block() -> None:
        with best:
            monkeypatch.setattr(torch, "_foreach_copy_", interrupt)
            best.save(1)

    with pytest.raises(KeyboardInterrupt):
        block()
    assert same(model.weight.detach(), torch.full((2, 2), 7.0))
    with pytest.raises(RuntimeError, match="nothing to restore"):
        best.restore()
    best.save(1)
    assert best.restore() == 1


def test_a_save_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    best = BestWeights({"model": model}, storage=tmp_path / "best.pt")
    stopper = EarlyStopping(best=best)
    stopper.step(2.0)
    expected, before = contents(model), stopper.state_dict()
    nn.init.zeros_(model.weight)

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        stopper.step(1.0)
    assert stopper.state_dict() == before
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]
    assert best.restore() == 0
    assert same(contents(model), expected)


class Odd:
    """Has state of a class that files do not hold."""

    def __init__(self) -> None:
        self.state: Any = 0

    def state_dict(self) -> Any:
        return {"value": self.state}

    def load_state_dict(self, state: Any) -> None:
        self.state = state["value"]


def test_what_a_file_cannot_hold(tmp_path: Path) -> None:
    odd = Odd()
    best = BestWeights({"odd": odd}, storage=tmp_path / "best.pt")
    best.save(0)
    odd.state = Case("SGD", {})
    with pytest.raises(TypeError, match=r"best\.pt.*fusedopt\.cases\.Case"):
        best.save(1)
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]
    assert best.restore() == 0
    assert odd.state == 0


def test_other_containers_and_tensors() -> None:
    odd = Odd()
    odd.state = (
        {1, 2},
        [torch.ones(2), None],
        {"sub": (nn.Parameter(torch.ones(1)), Case("SGD", {}))},
    )
    best = BestWeights({"odd": odd})
    best.save(0)
    odd.state[1][0].zero_()
    odd.state[0].clear()
    odd.state[2]["sub"][0].detach().zero_()
    best.restore()
    assert odd.state[0] == {1, 2}
    assert odd.state[2]["sub"][1] == Case("SGD", {})
    assert same([odd.state[1][0], odd.state[2]["sub"][0].detach()], [torch.ones(2), torch.ones(1)])


def test_what_others_hold_is_not_written_to() -> None:
    odd = Odd()
    odd.state = mine = torch.zeros(2)
    best = BestWeights({"odd": odd})
    best.save(0)
    odd.state = later = torch.ones(2)
    best.restore()
    assert same([mine, later, odd.state], [torch.zeros(2), torch.ones(2), torch.zeros(2)])
    odd.state.fill_(5)
    best.restore()
    assert same(odd.state, torch.zeros(2))


def test_an_optimizers_state_that_is_tied_only_now() -> None:
    params = make_params([(3,), (3,)])
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    set_grads(params, 0)
    optimizer.step()
    best = BestWeights({"optimizer": optimizer})
    best.save(0)
    expected = contents(optimizer)
    first, second = (optimizer.state[p] for p in params)
    first["momentum_buffer"] = second["momentum_buffer"]
    best.restore()
    assert same(contents(optimizer), expected)


def test_state_in_another_dtype_since() -> None:
    """It comes back with all its bits, not by way of the present, narrower one."""
    params = make_params([(50,)])
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    set_grads(params, 0)
    optimizer.step()
    best = BestWeights({"optimizer": optimizer})
    best.save(0)
    expected = contents(optimizer)
    state = optimizer.state[params[0]]
    state["momentum_buffer"] = state["momentum_buffer"].bfloat16()
    best.restore()
    assert same(contents(optimizer), expected)


def change_shape(model: nn.Sequential, optimizer: Any) -> None:
    model[1].weight = nn.Parameter(torch.ones(2, 3))


def change_name(model: nn.Sequential, optimizer: Any) -> None:
    model[1].register_parameter("scale", nn.Parameter(torch.ones(2)))


def take_away(model: nn.Sequential, optimizer: Any) -> None:
    del model[1]


def add_group(model: nn.Sequential, optimizer: Any) -> None:
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def change_state(model: nn.Sequential, optimizer: Any) -> None:
    optimizer.state[model[1].weight]["momentum_buffer"] = torch.ones(3)


@table(
    "row",
    {
        "shape": (change_shape, r"model: 1\.weight has the shape \(2, 3\), but had \(2, 2\)"),
        "new": (change_name, r"model: 1\.scale was not there"),
        "gone": (take_away, r"model: 1\.weight is no longer there"),
        "group": (add_group, r"optimizer: param_groups have \[4, 1\] parameters, but had \[4\]"),
        "state": (change_state, r"optimizer: state\.2\.momentum_buffer has the shape \(3,\)"),
    },
)
@every_storage
def test_what_has_changed_since(storage: str, row: Any, place: Callable[[str], Any]) -> None:
    change, message = row
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 1)
    best = BestWeights({"model": model, "optimizer": optimizer}, storage=place(storage))
    best.save(0)
    train(model, optimizer, 1)
    change(model, optimizer)
    before = contents(model, optimizer)
    with pytest.raises(ValueError, match=message + ".*nothing was restored"):
        best.restore()
    assert same(contents(model, optimizer), before)
    best.save(1)  # which keeps it as it is now
    before = contents(model, optimizer)
    assert best.restore() == 1
    assert same(contents(model, optimizer), before)


def test_a_model_in_another_dtype_since() -> None:
    """It could not hold all bits of what was kept."""
    model = nn.Linear(2, 2)
    best = BestWeights({"model": model})
    best.save(0)
    expected = contents(model)
    model.bfloat16()
    before = contents(model)
    with pytest.raises(
        ValueError, match=r"model: bias is torch.bfloat16, but was torch.float32|model: weight"
    ):
        best.restore()
    assert same(contents(model), before)
    model.float()
    assert best.restore() == 0
    assert same(contents(model), expected)
    with pytest.raises(ValueError, match=r"state_dict: net: .* is torch.float64, but was torch.fl"):
        BestWeights({"net": nn.Linear(2, 2).double()}).load_state_dict(
            {"step": 0, "kept": {"net": expected[0]}}
        )


@needs_sparse
def test_a_sparse_entry_that_is_gone() -> None:
    """Nothing is written before that is known."""
    model = nn.Linear(2, 2)
    model.register_buffer("graph", torch.eye(2).to_sparse())
    best = BestWeights({"model": model})
    best.save(0)
    for change in (
        lambda: setattr(model, "graph", torch.eye(3).to_sparse()),
        lambda: delattr(model, "graph"),
    ):
        nn.init.zeros_(model.weight)
        change()
        with pytest.raises(ValueError, match=r"model: graph (is no longer there|has the shape)"):
            best.restore()
        assert not model.weight.any()


def test_extra_state_is_the_modules_own_business() -> None:
    """Also when there are tensors in it that have not been there."""
    model = Net()
    best = BestWeights({"model": model})
    model.extra = {"history": torch.zeros(2)}
    best.save(0)
    expected = contents(model)
    model.extra = {"history": torch.ones(3), "more": torch.ones(1)}
    nn.init.zeros_(model.first.weight)
    best.restore()
    assert same(contents(model), expected)


@table(
    "make",
    {
        "ours": lambda p: fusedopt.SGD(p, lr=0.1, momentum=0.9),
        "stock": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    },
)
@every_storage
def test_state_that_belongs_to_no_parameter(
    make: Any, storage: str, place: Callable[[str], Any]
) -> None:
    model = nn.Linear(4, 2)
    optimizer = make(model.parameters())
    train(model, optimizer, 1)
    optimizer.state["epoch"] = 1
    optimizer.state["seen"] = torch.ones(2)
    best = BestWeights({"model": model, "optimizer": optimizer}, storage=place(storage))
    best.save(0)
    expected = contents(model)
    train(model, optimizer, 1)
    optimizer.state["epoch"] = 2
    optimizer.state["seen"].add_(1)
    assert best.restore() == 0
    assert same(contents(model), expected)
    assert optimizer.state["epoch"] == 1
    assert optimizer.state["seen"].tolist() == [1, 1]


class Stubborn(Odd):
    """Does not take its state back."""

    def load_state_dict(self, state: Any) -> None:
        raise ZeroDivisionError("no, thanks")


@every_storage
def test_one_that_cannot_be_restored_does_not_keep_the_others(
    storage: str, place: Callable[[str], Any]
) -> None:
    model, odd = nn.Linear(2, 2), Odd()
    items = {"model": model, "stubborn": Stubborn(), "odd": odd}
    best = BestWeights(items, storage=place(storage))
    best.save(3)
    expected = contents(model)
    nn.init.zeros_(model.weight)
    odd.state = 7
    told = r"'stubborn' could not be restored; all else .* step 3 .*ZeroDivisionError\('no, thanks"
    with pytest.raises(RuntimeError, match=told):
        best.restore()
    assert same(contents(model), expected)
    assert odd.state == 0


def test_a_file_of_other_names(tmp_path: Path) -> None:
    model, path = nn.Linear(2, 2), tmp_path / "best.pt"
    best = BestWeights({"model": model}, storage=path)
    best.save(0)
    BestWeights({"net": model}, storage=path).save(0)
    nn.init.zeros_(model.weight)
    with pytest.raises(ValueError, match=r"best\.pt is of \['net'\], not of \['model'\]"):
        best.restore()
    assert not model.weight.any()


@needs_host_memory
@pytest.mark.filterwarnings("ignore:Exception ignored")  # of files, interrupted while being opened
@pytest.mark.parametrize("storage", ["cpu", "file"])
def test_all_is_whole_wherever_it_is_interrupted(storage: str, place: Callable[[str], Any]) -> None:
    """What is kept is of the step that it says it is, or there is nothing; and all comes back."""

    def make() -> tuple[BestWeights, nn.Module, Odd]:
        model, odd = nn.Linear(1, 2), Odd()
        nn.init.ones_(model.weight)
        odd.state = 1
        best = BestWeights({"model": model, "odd": odd}, storage=place(storage))
        best.save(1)
        nn.init.constant_(model.weight, 2)
        odd.state = 2
        return best, model, odd

    def values(model: nn.Module, odd: Odd) -> set[float]:
        return {*model.weight.detach().view(-1).tolist(), float(odd.state)}

    for best, model, odd in interrupted_everywhere(make, lambda subject: subject[0].save(2)):
        assert values(model, odd) == {2.0}
        if best.step is None:
            assert storage == "cpu"
        else:
            assert best.restore() == best.step
            assert values(model, odd) == {float(best.step)}
    for best, model, odd in interrupted_everywhere(make, lambda subject: subject[0].restore()):
        assert best.step == 1
        assert values(model, odd) in ({1.0}, {2.0})
    state = make()[0].state_dict()
    for best, model, odd in interrupted_everywhere(
        make, lambda subject: subject[0].load_state_dict({**state, "step": 1})
    ):
        assert best.step in (None, 1)
        if best.step is not None:
            best.restore()
            assert values(model, odd) == {1.0}


@every_storage
def test_within_inference_mode(storage: str, place: Callable[[str], Any]) -> None:
    model = nn.Linear(4, 2)
    optimizer = fusedopt.AdamW(model.parameters(), state_dtype=torch.uint8)
    best = BestWeights({"model": model, "optimizer": optimizer}, storage=place(storage))
    train(model, optimizer, 1)
    with torch.inference_mode():
        best.save(0)
    train(model, optimizer, 1)
    best.save(1)
    expected = contents(model, optimizer)
    with torch.inference_mode():
        best.restore()
    assert same(contents(model, optimizer), expected)
    train(model, optimizer, 1)


@needs_host_memory
def test_autograd_learns_of_the_change() -> None:
    weight = nn.Parameter(torch.ones(2))
    best = BestWeights({"model": nn.ParameterList([weight])})
    best.save(0)
    loss = (weight * weight).sum()
    best.restore()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_storage
def test_resuming_with_what_is_kept(storage: str, place: Callable[[str], Any]) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 1)
    items = {"model": model, "optimizer": optimizer}
    first = BestWeights(items, storage=place(storage))
    unsaved = BestWeights(items, storage=place(storage))
    unsaved.load_state_dict(through_a_file(first.state_dict()))
    assert unsaved.step is None
    first.save(5)
    expected = contents(model, optimizer)
    checkpoint = through_a_file(first.state_dict())
    train(model, optimizer, 1)
    second = BestWeights(items, storage=place(storage))
    second.load_state_dict(checkpoint)
    assert second.restore() == 5
    assert same(contents(model, optimizer), expected)
    second.save(6)
    assert first.step == 5


def test_resuming_between_storages(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    path = tmp_path / "best.pt"
    in_memory, in_file = BestWeights({"model": model}), BestWeights({"model": model}, storage=path)
    in_memory.save(3)
    expected = contents(model)
    in_file.load_state_dict(in_memory.state_dict())
    nn.init.zeros_(model.weight)
    assert in_file.restore() == 3
    assert same(contents(model), expected)
    with pytest.raises(ValueError, match="is of a file, and storage is 'cpu'"):
        in_memory.load_state_dict(in_file.state_dict())
    path.unlink()
    with pytest.raises(ValueError, match=r"is of a file, and storage is .*best\.pt"):
        in_file.load_state_dict(in_file.state_dict())
    with pytest.raises(ValueError, match=r"of \['model'\], not of \['net'\]"):
        BestWeights({"net": model}).load_state_dict(in_memory.state_dict())


def test_resuming_when_the_file_is_of_another_step(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    path = tmp_path / "best.pt"
    best = BestWeights({"model": model}, storage=path)
    best.save(7)
    checkpoint = through_a_file(best.state_dict())
    nn.init.ones_(model.weight)
    best.save(12)
    resumed = BestWeights({"model": model}, storage=path)
    with pytest.raises(ValueError, match=r"best\.pt holds step 12.*of step 7: a later best"):
        resumed.load_state_dict(checkpoint)
    assert resumed.step is None
    nn.init.zeros_(model.weight)
    resumed.load_state_dict({**checkpoint, "step": 12})
    assert resumed.restore() == 12
    assert torch.equal(model.weight, torch.ones_like(model.weight))
    best.save(3)
    with pytest.raises(ValueError, match=r"best\.pt holds step 3.*of step 7: an older file"):
        resumed.load_state_dict(checkpoint)
    assert resumed.step == 12


@table(
    "row",
    {
        "text": ("no checkpoint at all", r"best\.pt is not what BestWeights has written: "),
        "empty": ("", r"best\.pt is not what BestWeights has written: "),
        "list": ([1], r"best\.pt is not what BestWeights has written, but holds list"),
        "a model": ({"weight": torch.ones(1)}, r"written, but holds \['weight'\]"),
        "names": (
            {"step": 7, "kept": {"net": {}}},
            r"best\.pt is of \['net'\], not of \['model'\]",
        ),
        "shapes": (
            {"step": 7, "kept": {"model": nn.Linear(3, 2).state_dict()}},
            r"best\.pt: model: weight has the shape \(2, 2\), but had \(2, 3\)",
        ),
    },
)
def test_resuming_when_the_file_holds_something_else(row: tuple[Any, str], tmp_path: Path) -> None:
    content, message = row
    path = tmp_path / "best.pt"
    if isinstance(content, str):
        path.write_text(content)
    else:
        torch.save(content, path)
    best = BestWeights({"model": nn.Linear(2, 2)}, storage=path)
    with pytest.raises(ValueError, match=message):
        best.load_state_dict({"step": 7, "kept": {}})
    assert best.step is None


def test_a_file_that_is_spoilt_before_the_restore(tmp_path: Path) -> None:
    best = BestWeights({"model": nn.Linear(2, 2)}, storage=tmp_path / "best.pt")
    best.save(0)
    (tmp_path / "best.pt").write_text("gone")
    with pytest.raises(ValueError, match=r"best\.pt is not what BestWeights has written"):
        best.restore()


@table(
    "row",
    {
        "empty": ({}, "state_dict is not that of BestWeights"),
        "no mapping": (None, "state_dict is not that of BestWeights, but has None"),
        "shapes": (
            {"net": nn.Linear(3, 2).state_dict(), "sgd": {"param_groups": [{"params": [0, 1]}]}},
            r"state_dict: net: weight has the shape \(2, 2\), but had \(2, 3\)",
        ),
        "groups": (
            {"net": nn.Linear(2, 2).state_dict(), "sgd": {"param_groups": [{"params": [0]}]}},
            r"state_dict: sgd: param_groups have \[2\] parameters, but had \[1\]",
        ),
        "no optimizer's": (
            {"net": nn.Linear(2, 2).state_dict(), "sgd": {}},
            "state_dict: sgd: an optimizer now, but was none",
        ),
    },
)
@pytest.mark.parametrize("in_file", [False, True])
def test_resuming_from_another_state(row: tuple[Any, str], in_file: bool, tmp_path: Path) -> None:
    kept, message = row
    net = nn.Linear(2, 2)
    items = {"net": net, "sgd": torch.optim.SGD(net.parameters())}
    best = BestWeights(items, storage=tmp_path / "best.pt" if in_file else "cpu")
    best.save(5)
    with pytest.raises(ValueError, match=message):
        best.load_state_dict({"step": 7, "kept": kept} if kept else kept)
    assert best.restore() == 5


def test_someone_else_wrote_the_file(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    mine, other = (BestWeights({"model": model}, storage=tmp_path / "best.pt") for _ in range(2))
    mine.save(3)
    other.save(4)
    with pytest.raises(RuntimeError, match=r"best\.pt holds step 4, not step 3"):
        mine.restore()


@table(
    "row",
    {
        "list": ([nn.Linear(1, 1)], {}, TypeError, "stateful.*Linear"),
        "empty": ({}, {}, ValueError, "stateful"),
        "name": ({1: nn.Linear(1, 1)}, {}, TypeError, "stateful.*1"),
        "tensor": ({"w": torch.ones(1)}, {}, TypeError, r"stateful\['w'\].*state_dict"),
        "storage": (
            {"m": nn.Linear(1, 1)},
            {"storage": "best.pt"},
            ValueError,
            "storage.*'best.pt'",
        ),
        "folder": (
            {"m": nn.Linear(1, 1)},
            {"storage": Path("no/such")},
            ValueError,
            "storage.*such",
        ),
        "is-folder": ({"m": nn.Linear(1, 1)}, {"storage": Path()}, ValueError, "storage"),
    },
)
def test_bad_arguments_of_best_weights(row: Any) -> None:
    stateful, options, kind, message = row
    with pytest.raises(kind, match=message):
        BestWeights(stateful, **options)


@pytest.mark.parametrize(("step", "kind"), [(-1, ValueError), (1.0, TypeError), (True, TypeError)])
def test_a_bad_step(step: Any, kind: type[Exception]) -> None:
    best = BestWeights({"model": nn.Linear(1, 1)})
    with pytest.raises(kind, match=f"step.*{step}"):
        best.save(step)
    assert best.step is None
