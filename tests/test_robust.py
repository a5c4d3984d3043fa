"""What nobody should do, and what must not go wrong when somebody does."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
from helpers import DEVICE, needs_zero_tensors
from torch import Tensor

import fusedopt


def trained(steps: int = 5, **options: float) -> tuple[list[Tensor], torch.optim.Optimizer]:
    """Two parameters after so many steps that nothing is looked at in full any more."""
    params = [torch.nn.Parameter(torch.ones(6)) for _ in range(2)]
    optimizer = fusedopt.AdamW(params, **options)
    for _ in range(steps):
        for p in params:
            p.grad = torch.full_like(p, 0.5)
        optimizer.step()
    return params, optimizer


def test_state_replaced_past_the_attribute() -> None:
    """By way of vars(), which no getter sees."""
    params, optimizer = trained()
    twins, twin = trained()
    new = torch.full((6,), 7.0)
    vars(optimizer)["state"][params[0]]["exp_avg"] = new.clone()
    twin.state[twins[0]]["exp_avg"] = new.clone()
    for either in (optimizer, twin):
        either.step()
    torch.testing.assert_close(params, twins, rtol=0, atol=0)
    mine = vars(optimizer)["state"][params[0]]["exp_avg"]
    torch.testing.assert_close(mine, twin.state[twins[0]]["exp_avg"], rtol=0, atol=0)


# Elements that take a step long enough for other threads to come between; the emulated GPU is slow.
LARGE = 300_000 if DEVICE.type != "fake" else 3_000


def test_one_step_at_a_time() -> None:
    params = [torch.nn.Parameter(torch.ones(LARGE)) for _ in range(4)]
    optimizer = fusedopt.AdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    done = [0, 0, 0]

    def work(index: int) -> None:
        for _ in range(50):
            try:
                optimizer.step()
                done[index] += 1
            except RuntimeError as error:
                if "while another one runs" not in str(error):
                    raise

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert optimizer.state[params[0]]["step"].item() == sum(done) > 0
    assert all(torch.equal(p, params[0]) for p in params)


def test_state_cleared_by_another_thread_outlives_the_step() -> None:
    params = [torch.nn.Parameter(torch.ones(3 * LARGE))]
    optimizer = fusedopt.AdamW(params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    stop = threading.Event()

    def clear() -> None:
        while not stop.is_set():
            optimizer.state.clear()

    thread = threading.Thread(target=clear)
    thread.start()
    for _ in range(30):
        optimizer.step()
    stop.set()
    thread.join()
    assert params[0].isfinite().all()


def test_overlap_that_began_at_a_failed_step_is_found() -> None:
    p, q = (torch.nn.Parameter(torch.ones(6)) for _ in range(2))
    groups = [{"params": [p]}, {"params": [q]}]
    optimizer = fusedopt.SGD(groups, lr=0.1)
    for x in (p, q):
        x.grad = torch.ones(6)
    for _ in range(5):
        optimizer.step()
    p.data = q.data[:]
    optimizer.param_groups[1]["lr"] = "bad"
    with pytest.raises(TypeError, match="param group 1: lr is not a number"):
        optimizer.step()
    optimizer.param_groups[1]["lr"] = 0.1
    before = q.detach().clone()
    with pytest.warns(UserWarning, match="share memory"):
        optimizer.step()
    torch.testing.assert_close(q.detach(), before - 0.2)


@needs_zero_tensors
def test_gradient_without_memory() -> None:
    """torch's own stand-in for zeros has no data pointer."""
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch._efficientzerotensor(3, device=DEVICE)
    optimizer = fusedopt.SGD([p], lr=0.1, weight_decay=0.5)
    with pytest.warns(UserWarning, match="not a plain dense tensor"):
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.95))


def test_one_counter_for_several_parameters_counts_as_in_stock() -> None:
    def run(cls: type[torch.optim.Optimizer]) -> float:
        params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
        optimizer = cls(params)
        for p in params:
            p.grad = torch.ones(3)
        optimizer.step()
        counter = torch.tensor(1.0)
        for p in params:
            optimizer.state[p]["step"] = counter
        optimizer.step()
        return counter.item()

    with pytest.warns(UserWarning, match="share memory"):
        mine = run(fusedopt.AdamW)
    assert mine == run(torch.optim.AdamW)


def test_state_in_a_graph_is_known_to_have_changed() -> None:
    params, optimizer = trained()
    weight = torch.ones(6, requires_grad=True)
    loss = (optimizer.state[params[0]]["exp_avg"] * weight).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class KeepsAll(fusedopt.AdamW):
    def __getstate__(self) -> dict:
        return self.__dict__


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_subclass_that_copies_everything(duplicate) -> None:
    optimizer = KeepsAll([torch.nn.Parameter(torch.ones(6))])
    for other in (optimizer, duplicate(optimizer)):
        other.param_groups[0]["params"][0].grad = torch.ones(6)
        other.step()
    again = duplicate(optimizer)
    for other in (optimizer, again):
        other.param_groups[0]["params"][0].grad = torch.ones(6)
        other.step()
    torch.testing.assert_close(
        again.param_groups[0]["params"], optimizer.param_groups[0]["params"], rtol=0, atol=0
    )


def test_the_warning_points_at_the_caller_and_comes_once() -> None:
    memory = torch.ones(6)
    params = [torch.nn.Parameter(part) for part in (memory[:4], memory[2:])]
    optimizer = fusedopt.SGD(params, lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            sum(p.sum() for p in params).backward()
            optimizer.step()
    ours = [w for w in caught if "fusedopt" in str(w.message)]
    assert len(ours) == 1
    assert ours[0].filename == __file__


def test_group_that_is_no_dict() -> None:
    _, optimizer = trained()
    optimizer.param_groups[0] = list(optimizer.param_groups[0].items())
    with pytest.raises(TypeError, match="param group 0 is not a dict"):
        optimizer.step()


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"foreach": False}], ids=str)
def test_where_there_are_no_kernels_torch_does_as_it_would(
    how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its choice among its own implementations is not changed."""
    seen = []

    def spy(optimizer: Any) -> None:
        seen.extend({k: g[k] for k in ("foreach", "fused")} for g in optimizer.param_groups)

    monkeypatch.setattr(fusedopt.AdamW, "_stock", type("Spy", (), {"step": spy}))
    params = [torch.nn.Parameter(torch.ones(3, device="meta"))]
    optimizer = fusedopt.AdamW(params, **how)
    params[0].grad = torch.ones(3, device="meta")
    with pytest.warns(UserWarning, match="leaves 1 parameter"):
        optimizer.step()
    assert seen == [{"foreach": how.get("foreach"), "fused": None}]


NUMBERS = [-torch.inf, 0.0, 1.5, torch.inf, torch.nan]


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_infinite_weights_have_infinite_averages(dtype: torch.dtype, decay: float) -> None:
    """Each number after each other: the mean, not what its difference makes of it."""
    first = torch.tensor(NUMBERS, dtype=dtype).repeat_interleave(len(NUMBERS))
    then = torch.tensor(NUMBERS, dtype=dtype).repeat(len(NUMBERS))
    p = torch.nn.Parameter(first.repeat(40))  # more than vectors' ends
    optimizer = fusedopt.SGD([p], lr=0.0, ema_decay=decay)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    averages = [optimizer.state[p]["ema"].clone()]
    p.data.copy_(then.repeat(40))
    optimizer.step()
    averages.append(optimizer.state[p]["ema"])
    mean = then if decay == 0 else decay * first.double() + (1 - decay) * then.double()
    for average, expected in zip(averages, (first, mean), strict=True):
        expected = expected.repeat(40).to(average.dtype)
        torch.testing.assert_close(average, expected, equal_nan=True)


def test_mask_of_minus_inf_is_its_own_average() -> None:
    """Beside weights that are trained, whatever the rule and the warm-up."""
    p = torch.nn.Parameter(torch.tensor([1.0, -torch.inf] * 300))
    optimizer = fusedopt.AdamW([p], lr=0.1, ema_decay=0.99, ema_warmup=True)
    for _ in range(5):
        p.grad = torch.tensor([1.0, 0.0] * 300)
        optimizer.step()
    ema = optimizer.state[p]["ema"]
    assert (ema[1::2] == -torch.inf).all()
    assert ema[::2].isfinite().all()


# --- Memory that is shared ------------------------------------------------------------------------

RULES = {
    "Adam": {"weight_decay": 0.1},
    "AdamW": {"weight_decay": 0.5, "eps": 1.0},
    "SGD": {"momentum": 0.9, "weight_decay": 0.1},
    "RMSprop": {"weight_decay": 0.1},
    "Adagrad": {},
}


def own(params: list[Tensor], state: dict[str, Tensor]) -> None:
    params[0].grad = params[0].detach().view_as(params[0])


def own_part(params: list[Tensor], state: dict[str, Tensor]) -> None:
    memory = torch.linspace(1, 2, 2001)
    params[0].data, params[0].grad = memory[1:], memory[:-1]


def of_another(params: list[Tensor], state: dict[str, Tensor]) -> None:
    params[0].grad, params[1].grad = params[1].detach(), params[0].detach()[:]


def of_state(params: list[Tensor], state: dict[str, Tensor]) -> None:
    params[1].grad = next(v for n, v in state.items() if v.shape == params[0].shape)[:]


SHARING = {f.__name__: f for f in (own, own_part, of_another, of_state)}


@pytest.mark.parametrize("settled", [0, 5], ids=["at_first", "later"])
@pytest.mark.parametrize("share", SHARING.values(), ids=SHARING)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.filterwarnings("ignore:.*to torch's own")
def test_gradients_in_memory_that_the_step_writes(name: str, share: Any, settled: int) -> None:
    """As stock's for-loop: its numbers, or its refusal."""
    results = []
    for module in (fusedopt, torch.optim):
        options = RULES[name] if module is fusedopt else {**RULES[name], "foreach": False}
        params = [torch.nn.Parameter(torch.linspace(1, i + 2, 2000)) for i in range(2)]
        optimizer = getattr(module, name)(params, lr=0.1, **options)
        try:
            for step in range(settled + 4):
                for i, p in enumerate(params):
                    p.grad = torch.linspace(0.1, i + 1, 2000)
                if step >= max(settled, 1):
                    if step == settled:  # else a settled step looks at few gradients' places
                        params[0].data = params[0].data.clone()
                    share(params, vars(optimizer)["state"][params[0]])
                optimizer.step()
            results.append([p.detach().clone() for p in params])
        except RuntimeError as error:
            results.append(str(error))
    if isinstance(results[1], str):
        assert results[0] == results[1]
    else:
        torch.testing.assert_close(*results)


def test_gradients_may_share_memory_with_each_other() -> None:
    params = [torch.nn.Parameter(torch.ones(6)) for _ in range(3)]
    optimizer = fusedopt.SGD(params, lr=0.1)
    grads = torch.ones(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            for i, p in enumerate(params):
                p.grad = grads[i : i + 6]
            optimizer.step()
    torch.testing.assert_close(params[2].detach(), torch.full((6,), 0.7))


def test_only_those_are_left_to_torch_whose_memory_is_shared() -> None:
    """And only as long as it is."""
    params = [torch.nn.Parameter(torch.ones(6)) for _ in range(4)]
    optimizer = fusedopt.SGD(params, lr=0.1)
    for p in params:
        p.grad = torch.ones(6)
    params[1].grad = params[2].detach()
    with pytest.warns(UserWarning, match=r"leaves 2 parameter.*gradients that share memory"):
        optimizer.step()
    torch.testing.assert_close(params[1].detach(), torch.full((6,), 0.9))
    params[1].grad = torch.ones(6)
    optimizer.max_grad_norm = torch.inf  # refuses what torch has to take
    for _ in range(3):
        optimizer.step()


def test_accumulated_gradients_may_be_the_parameters() -> None:
    """accumulate() does not write those."""
    p = torch.nn.Parameter(torch.full((6,), 2.0))
    optimizer = fusedopt.SGD([p], lr=0.1)
    p.grad = p.detach()
    optimizer.accumulate()
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((6,), 1.8))


def test_scales_that_parameters_share() -> None:
    params = [torch.nn.Parameter(torch.ones(6)) for _ in range(2)]
    optimizer = fusedopt.Adam(params, state_dtype=torch.uint8)
    for p in params:
        p.grad = torch.ones(6)
    optimizer.step()
    first, second = (optimizer.state[p] for p in params)
    second["exp_avg_scale"] = first["exp_avg_scale"]
    with pytest.raises(RuntimeError, match="share memory; state_dtype"):
        optimizer.step()


# --- Names ----------------------------------------------------------------------------------------


def test_names_that_are_no_text_are_told_in_escapes() -> None:
    """As file names that do not decode have lone surrogates."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fusedopt.SGD([("layer\udcff", p)], lr=0.1)
    p.grad = torch.full((3,), torch.nan)
    optimizer.nonfinite = "raise"
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 \(layer\\udcff\): its grad"):
        optimizer.step()


class Odd:
    def __repr__(self) -> str:
        return "odd\ud800"


def test_options_that_show_as_no_text() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fusedopt.SGD([p], lr=0.1)
    p.grad = torch.ones(3)
    optimizer.param_groups[0]["momentum"] = Odd()
    with pytest.raises(TypeError, match=r"param group 0: momentum is not a number: odd\\ud800"):
        optimizer.step()
