"""What is particular to a GPU: nobody waits, graphs, streams, several devices, and what it reports.

``pytest --device cuda`` runs these on one, ``--device fake`` on an emulated one (emulation.py);
they also make all other tests run there.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import math
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from helpers import (
    CLASSES,
    DEVICE,
    SETTLED,
    Twins,
    assert_same,
    classes,
    contents_of,
    every_class,
    every_class_with,
    make_params,
    nothing_written,
    on_cpu,
    params_of,
    set_grads,
    table,
)
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt
from fusedopt import device
from fusedopt.cases import CASES, Case
from fusedopt.recipe import Recipe

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(DEVICE.type == "cpu", reason="needs --device cuda or --device fake"),
]
FAKE = DEVICE.type == "fake"
only_cuda = pytest.mark.skipif(FAKE, reason="needs a real GPU")
only_fake = pytest.mark.skipif(not FAKE, reason="counts what only the emulated GPU tells")
one_device = DEVICE.type == "cuda" and torch.cuda.device_count() < 2
several = pytest.mark.skipif(one_device, reason="needs several GPUs")
if FAKE:
    import emulation

MIXED_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [(0,), (1,), (3,), (17,), (4097,), (33, 7)]

# Everything a step can do, at once.
EVERYTHING = {
    "max_grad_norm": 0.1,
    "grad_norm_type": math.inf,  # does not depend on an order
    "nonfinite": "skip",
    "weight_precision": "master",
    "ema_decay": 0.9,
    "ema_warmup": True,
    "l1": 1e-3,
}


@contextmanager
def no_waiting() -> Iterator[None]:
    """Nothing in the block waits for the device."""
    if FAKE:
        before = emulation.synchronizations()
        yield
        assert emulation.synchronizations() == before
        return
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def new_graph(keep_graph: bool = False) -> Any:
    """With ``keep_graph``, one whose nodes() can be counted."""
    return emulation.Graph() if FAKE else torch.cuda.CUDAGraph(keep_graph)


@contextmanager
def capture(graph: Any, share: Any = None) -> Iterator[None]:
    """In memory of the graph's own, or in that of another graph's."""
    if FAKE:
        with graph.capture(share):
            yield
        return
    something = torch.zeros(1, device=DEVICE)
    with torch.cuda.graph(graph, pool=None if share is None else share.pool()):
        something.add_(1)  # torch warns of empty graphs, also in place of an error
        yield


def nodes(graph: Any) -> int:
    """Kernels and copies that a replay takes."""
    if FAKE:
        return graph.nodes()
    count = ctypes.c_size_t()
    handle = ctypes.c_void_p(graph.raw_cuda_graph())
    assert ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(handle, None, ctypes.byref(count)) == 0
    return count.value - 1  # capture() adds one


def tables_of_graphs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Returns a function that counts those in memory, of the graphs captured from now on."""
    tables = []

    def spy(*arguments: Any) -> Tensor:
        tensor = allocate(*arguments)
        tables.append(weakref.ref(tensor))
        return tensor

    allocate = device.allocate_for
    monkeypatch.setattr(device, "allocate_for", spy)
    return lambda: sum(table() is not None for table in tables)


def becomes(count: Callable[[], int], expected: int, step: Callable[[], Any]) -> bool:
    """Whether so many are left after a step. (CUDA tells with some delay that a graph is gone.)"""
    gc.collect()
    step()
    give_up = time.monotonic() + 30
    while not FAKE and count() > expected and time.monotonic() < give_up:
        time.sleep(0.01)
        step()
    return count() == expected


def mixed_params() -> list[Parameter]:
    return [p for dtype in MIXED_DTYPES for p in make_params(SIZES, dtype)]


def number(value: float) -> Tensor:
    return torch.tensor(value, device=DEVICE)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_as_on_the_cpu(case: Case) -> None:
    """All dtypes in one step, with everything that it can do."""
    coded = {"state_dtype": torch.bfloat16} if "centered" not in case.options else {}
    for options in ({}, EVERYTHING, {"max_grad_value": 0.5, **coded}):
        there, here = mixed_params(), on_cpu(mixed_params())
        ours, reference = case.ours(there, **options), case.ours(here, **options)
        for step in range(4):
            for optimizer in (ours, reference):
                set_grads(params_of(optimizer), step)
                torch.manual_seed(0)  # from which both draw the same seeds
                optimizer.step()
        for (p, state), (q, expected) in zip(
            contents_of(ours), contents_of(reference), strict=True
        ):
            torch.testing.assert_close(p.cpu(), q)
            for name, value in expected.items():
                if name == "step":  # a device counts in doubles
                    value = value.double()
                torch.testing.assert_close(state[name].cpu(), value)
        assert ours.grad_norm.device.type == DEVICE.type
        norms = float(ours.grad_norm), float(reference.grad_norm)
        assert norms[0] == pytest.approx(norms[1], rel=1e-6, nan_ok=True)


@every_class
@table("options", {"plain": {}, "8_bits": {"state_dtype": torch.uint8}, "all": EVERYTHING})
def test_nobody_waits_for_state(case: Case, options: dict[str, Any]) -> None:
    """That the first step, and the first accumulate(), make."""
    if case.options.get("centered") and "state_dtype" in options:
        case = Case(case.name, {"lr": 0.01})
    params = make_params(dtype=torch.bfloat16)
    with torch.device("cpu"):  # where stock's constructor may put something
        optimizer = case.ours(params, **options)
        set_grads(params, 0)
        with no_waiting():
            optimizer.accumulate()
        set_grads(params, 1)
        with no_waiting():
            optimizer.step()


@every_class
def test_nobody_waits(case: Case) -> None:
    """Not in a step, nor in what is asked about it; also where Python would have to decide."""
    params = mixed_params()
    optimizer = (
        case.ours(params, nonfinite="skip", max_grad_norm=1.0, lr=number(0.01))
        if "lr" not in case.options
        else Case(case.name, {k: v for k, v in case.options.items() if k != "lr"}).ours(
            params, nonfinite="skip", max_grad_norm=1.0, lr=number(0.01)
        )
    )
    told = []
    for step in range(SETTLED):
        set_grads(params, step)
        if step == 2:
            params[2].grad[0] = math.nan
        if step == 3:
            optimizer.grad_scale, optimizer.found_inf = number(2.0), number(1.0)
        with no_waiting():
            optimizer.accumulate()
        set_grads(params, step)
        if step == 3:
            with no_waiting():
                optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
            continue
        with no_waiting():
            optimizer.step()
            told.append((optimizer.grad_norm, optimizer.skipped_steps))
    assert [int(skipped) for _, skipped in told] == [0, 0, 1, 2]
    assert [math.isfinite(norm) for norm, _ in told] == [True, True, False, True]


@only_fake
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtypes", [1, 3])
def test_one_launch(dtypes: int, groups: int) -> None:
    """Whatever the number of tensors and groups; and nothing is copied anew.

    But tensors in other storage formats have a launch of their own.
    """
    params = [p for dtype in MIXED_DTYPES[:dtypes] for p in make_params(SIZES, dtype)]
    optimizer = fusedopt.AdamW([{"params": params[i::groups]} for i in range(groups)])
    counts = []
    for step in range(6):
        if step in (0, 3):
            set_grads(params, step)
        if step == 4:
            optimizer.max_grad_norm = 1.0
        if step == 5:
            optimizer.param_groups[0]["lr"] = 0.5
        before = emulation.launches(), emulation.uploads()
        optimizer.step()
        launches = (emulation.launches() - before[0]) / dtypes
        counts.append((launches, emulation.uploads() - before[1]))
    assert counts == [(1, 2), (1, 0), (1, 0), (1, 1), (2, 0), (2, 1)]


def check_against_the_cpu(
    there: list[Parameter], groups: int, change: Callable[[int, Optimizer], None]
) -> None:
    """Five steps on both; change(step, optimizer) comes between gradients and step."""
    here = on_cpu(there)
    optimizers = [
        fusedopt.AdamW([{"params": params[i::groups]} for i in range(groups)], lr=0.1)
        for params in (there, here)
    ]
    for step in range(5):
        for optimizer in optimizers:
            set_grads(params_of(optimizer), step)
            change(step, optimizer)
            optimizer.step()
    for p, expected in zip(there, here, strict=True):
        torch.testing.assert_close(p.detach().cpu(), expected.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_are_not_aligned_now_and_then(dtype: torch.dtype) -> None:
    """As views of one buffer: another kernel takes them, to the same bits."""

    def move(step: int, optimizer: Optimizer) -> None:
        for p in params_of(optimizer) if step in (1, 3) else []:
            buffer = torch.empty(p.numel() + 1, dtype=dtype, device=p.device)
            p.grad = buffer[1:].view(p.shape).copy_(p.grad)

    check_against_the_cpu(make_params(SIZES, dtype), 1, move)


def test_gradients_that_are_strided_now_and_then() -> None:
    def transpose(step: int, optimizer: Optimizer) -> None:
        for p in params_of(optimizer) if step in (0, 2) else []:
            p.grad = p.grad.t().contiguous().t()

    check_against_the_cpu(make_params([(40, 30)] * 2), 1, transpose)


def test_fewer_tensors_than_before() -> None:
    """A group is gone: what is on the device is another table."""

    def drop(step: int, optimizer: Optimizer) -> None:
        if step == 2:
            del optimizer.param_groups[1]

    check_against_the_cpu(make_params([(300,)] * 6), 2, drop)


def test_gradients_that_come_and_go() -> None:
    """As of a mixture of experts: only where gradients lie is copied anew."""
    twins = Twins(CLASSES[0], lambda: make_params([(300,)] * 12))
    chosen: Callable[[int, int], bool] = lambda step, index: (step + index) % 3 == 0  # noqa: E731
    for step in range(9):
        before = emulation.uploads() if FAKE else 0
        twins.step(wanted=lambda _, index, step=step: chosen(step, index))
        if FAKE and step >= 6:
            assert emulation.uploads() - before == 1


def test_20_000_tensors() -> None:
    there = make_params([(i % 5,) for i in range(20_000)])
    here = on_cpu(there)
    ours, reference = (fusedopt.AdamW(params, max_grad_norm=1.0) for params in (there, here))
    for step in range(3):
        for params, optimizer in ((there, ours), (here, reference)):
            if step != 1:
                for i, p in enumerate(params):
                    p.grad = torch.full_like(p, (i + step) % 7 - 3)
            optimizer.step()
    updated = [torch.cat([p.detach() for p in params]).cpu() for params in (there, here)]
    torch.testing.assert_close(*updated)


@every_class
@table("options", {"clip": {"max_grad_norm": 0.5}, "all": EVERYTHING})
def test_the_same_bits_in_each_run(case: Case, options: dict[str, Any]) -> None:
    """Nothing depends on the order in which blocks come to be run."""
    runs = []
    for _ in range(2):
        params = make_params([(100_000 if DEVICE.type == "cuda" else 3000,)] * 5, torch.bfloat16)
        optimizer = case.ours(params, **options, state_dtype=torch.float32)
        for step in range(3):
            set_grads(params, step)
            torch.manual_seed(0)
            optimizer.step()
        runs.append([optimizer.grad_norm, contents_of(optimizer)])
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


@every_class
@table("options", {"plain": {}, "clip": {"max_grad_norm": 0.5}, "all": EVERYTHING})
def test_graph(case: Case, options: dict[str, Any]) -> None:
    """A captured step, replayed with other gradients and learning rates, is the step."""
    settings = {**case.options, **options}
    lr = settings.pop("lr")
    case = Case(case.name, settings)
    dtype = torch.bfloat16 if "weight_precision" in options else torch.float32
    mine, theirs = make_params(dtype=dtype), make_params(dtype=dtype)
    rate = number(lr)
    ours, reference = case.ours(mine, lr=rate), case.ours(theirs, lr=lr)
    for optimizer in (ours, reference):
        set_grads(params_of(optimizer), 0)
        optimizer.step()
    graph = new_graph()
    with capture(graph):
        ours.step()
    for step in range(1, 6 if FAKE else 101):
        set_grads(theirs, step)
        for p, q in zip(mine, theirs, strict=True):
            p.grad.copy_(q.grad)
        rate.fill_(lr / step)
        reference.param_groups[0]["lr"] = float(rate)
        if step == 3:  # a step without the graph, in between, on other gradients
            kept = [p.grad for p in mine]
            for p, q in zip(mine, theirs, strict=True):
                p.grad = q.grad.clone()
            ours.step()
            for p, grad in zip(mine, kept, strict=True):
                p.grad = grad
        else:
            graph.replay()
        reference.step()
    torch.testing.assert_close(contents_of(ours), contents_of(reference), rtol=0, atol=0)
    torch.testing.assert_close(ours.grad_norm, reference.grad_norm, equal_nan=True)


@every_class
def test_graph_of_a_whole_window(case: Case) -> None:
    """accumulate(), accumulate(), step(), captured at once."""
    mine, theirs = make_params(), make_params()
    ours, reference = case.ours(mine), case.ours(theirs)
    batches = [[torch.zeros_like(p) for p in mine] for _ in range(3)]

    def window(optimizer: Any, params: list[Parameter]) -> None:
        for k, batch in enumerate(batches):
            for p, grad in zip(params, batch, strict=True):
                p.grad = grad
            optimizer.accumulate() if k < 2 else optimizer.step()

    def draw(step: int) -> None:
        for k, batch in enumerate(batches):
            set_grads(theirs, 10 * step + k)
            for grad, q in zip(batch, theirs, strict=True):
                grad.copy_(q.grad)

    draw(0)
    window(ours, mine)
    window(reference, theirs)
    graph = new_graph()
    with capture(graph):
        window(ours, mine)
    for step in range(1, 4):
        draw(step)
        graph.replay()
        window(reference, theirs)
    torch.testing.assert_close(contents_of(ours), contents_of(reference), rtol=0, atol=0)


def test_a_step_after_a_capture_knows_what_is_new() -> None:
    """What the captured step was the first to see, its own table has, but no other."""
    moved, late = make_params([(300,), (40,)])
    optimizer = fusedopt.SGD([late, moved], lr=1.0)
    for _ in range(SETTLED):
        moved.grad = torch.ones_like(moved)
        optimizer.step()
    old = moved.data
    moved.data = moved.data.clone()
    moved.grad, late.grad = torch.ones_like(moved), torch.ones_like(late)
    graph = new_graph()
    with capture(graph):
        optimizer.step()
    graph.replay()
    before = [p.detach().clone() for p in (old, moved, late)]
    optimizer.step()
    assert torch.equal(old, before[0])
    assert torch.equal(moved.detach(), before[1] - 1)
    assert torch.equal(late.detach(), before[2] - 1)


def test_windows_across_the_edge_of_a_graph_are_refused() -> None:
    (param,) = make_params([(30,)])
    optimizer = fusedopt.SGD([param], lr=1.0)
    for call in (optimizer.step, optimizer.accumulate, optimizer.step):
        param.grad = torch.ones_like(param)
        call()

    param.grad = torch.ones_like(param)
    with capture(new_graph()):
        optimizer.accumulate()
    param.grad = torch.ones_like(param)
    for call in (optimizer.step, optimizer.accumulate):
        with nothing_written(optimizer), pytest.raises(RuntimeError, match="in one CUDA graph"):
            call()
    optimizer.zero_grad()  # the way out

    param.grad = torch.ones_like(param)
    optimizer.accumulate()
    param.grad = torch.ones_like(param)
    for call in (optimizer.step, optimizer.accumulate):
        with pytest.raises(RuntimeError, match="in one CUDA graph"), capture(new_graph()):
            call()
    before = param.detach().clone()
    optimizer.step()  # nothing is lost
    assert torch.equal(param.detach(), before - 1)


@table(
    "options, dtypes, expected",
    {
        "plain": ({}, [torch.float32], 1),
        "formats": ({}, [torch.float32, torch.bfloat16, torch.float16], 3),
        "norm": ({"max_grad_norm": 1.0}, [torch.float32], 2),
        "all": (EVERYTHING, [torch.bfloat16], 2),
        "float64": ({"max_grad_norm": 1.0}, [torch.float32, torch.float64], 4),
        "rules": ({"amsgrad": True}, [torch.float32], 2),
    },
)
def test_a_replay_is_a_launch(
    options: dict[str, Any], dtypes: list[torch.dtype], expected: int
) -> None:
    """For each rule and formats, and one more for the norm: nothing else is in a graph."""
    params = [Parameter(torch.ones(i % 5, dtype=dtype)) for dtype in dtypes for i in range(1000)]
    options = dict(options)
    groups = [{"params": params[::2], "amsgrad": options.pop("amsgrad", False)}]
    optimizer = fusedopt.AdamW([*groups, {"params": params[1::2]}], **options)
    set_grads(params, 0)
    optimizer.step()
    graph = new_graph(keep_graph=True)
    with capture(graph):
        optimizer.step()
    assert nodes(graph) == expected


def test_the_replay_of_a_window_is_a_launch_for_each_call() -> None:
    params = make_params([(5,)] * 200)
    optimizer = fusedopt.SGD(params, lr=1.0)
    batches = [[torch.ones_like(p) for p in params] for _ in range(3)]
    graph = new_graph(keep_graph=True)

    def window() -> None:
        for call, batch in zip(2 * [optimizer.accumulate] + [optimizer.step], batches, strict=True):
            for p, grad in zip(params, batch, strict=True):
                p.grad = grad
            call()

    window()
    with capture(graph):
        window()
    assert nodes(graph) == 3


def test_two_optimizers_in_one_graph() -> None:
    """As many have, one for the matrices and one for all else."""
    mine, theirs = make_params(), make_params()
    ours, references = (
        [
            fusedopt.AdamW(params[::2], lr=0.1, max_grad_norm=1.0),
            fusedopt.SGD(params[1::2], lr=0.1, momentum=0.9),
        ]
        for params in (mine, theirs)
    )
    graph = new_graph(keep_graph=True)
    for turn in range(5):
        set_grads(theirs, turn)
        for p, q in zip(mine, theirs, strict=True):
            p.grad = q.grad.clone() if p.grad is None else p.grad.copy_(q.grad)
        if turn == 1:
            with capture(graph):
                for optimizer in ours:
                    optimizer.step()
        if turn:
            graph.replay()
        for optimizer in references if turn else (*ours, *references):
            optimizer.step()
    assert nodes(graph) == 3
    for optimizer, reference in zip(ours, references, strict=True):
        torch.testing.assert_close(contents_of(optimizer), contents_of(reference), rtol=0, atol=0)


def test_a_graph_of_all_that_is_done_for_a_batch() -> None:
    """Forward, backward, step; two such graphs in the same memory, which each writes anew."""
    torch.manual_seed(0)
    start = [torch.randn(30, 40) / 8, torch.randn(40), torch.randn(40, 3) / 8]
    batches = [torch.randn(20, 30) for _ in range(2)]
    runs = []
    for replayed in (False, True):
        weights = [Parameter(tensor.clone()) for tensor in start]
        optimizer = fusedopt.AdamW(weights, lr=0.01, max_grad_norm=1.0)

        def step(batch: Tensor) -> None:
            optimizer.zero_grad()  # noqa: B023
            first, bias, second = weights  # noqa: B023
            hidden = torch.relu(batch @ first + bias)
            loss = ((hidden @ second) ** 2).mean()
            for size in range(9, 21):  # whatever a table's size is, here something lay before
                loss = loss + 0 * loss.detach().expand(2 ** (size - 2)).clone().amax()
            loss.backward()
            optimizer.step()  # noqa: B023

        for batch in batches:
            step(batch)
        graphs = [new_graph(), new_graph()]
        if replayed:
            optimizer.zero_grad()
            for i, batch in enumerate(batches):
                with capture(graphs[i], share=graphs[0] if i else None):
                    step(batch)
                optimizer.zero_grad()
        for turn in (0, 1, 1, 0):
            graphs[turn].replay() if replayed else step(batches[turn])
        runs.append([w.detach() for w in weights])
    torch.testing.assert_close(*runs)
    assert not torch.equal(runs[0][0], start[0])


def test_graphs_that_are_gone_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = tables_of_graphs(monkeypatch)
    params = make_params()
    optimizer = fusedopt.SGD(params, lr=0.1)
    set_grads(params, 0)
    optimizer.step()
    graphs = [new_graph() for _ in range(5)]
    for graph in graphs:
        with capture(graph):
            optimizer.step()
    optimizer.step()
    assert tables() == 5
    del graph, graphs[:3]
    assert becomes(tables, 2, optimizer.step)
    graphs.clear()
    assert becomes(tables, 0, optimizer.step)


@only_fake
def test_an_optimizer_that_is_gone_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of graphs that were gone before it."""
    tables = tables_of_graphs(monkeypatch)
    params = make_params()
    optimizer = fusedopt.SGD(params, lr=0.1)
    set_grads(params, 0)
    optimizer.step()
    with capture(new_graph()):
        optimizer.step()
    assert tables() == 1
    del optimizer
    gc.collect()
    assert tables() == 0


def test_a_graph_outlives_its_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the parameters do: what a user does not see, the graph holds."""
    tables = tables_of_graphs(monkeypatch)
    params = make_params()
    optimizer = fusedopt.SGD(params, lr=1.0, max_grad_norm=1e9)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    graph = new_graph()
    with capture(graph):
        optimizer.step()
    del optimizer
    gc.collect()
    others = [torch.full((2**size,), 7.0) for size in range(5, 17) for _ in range(20)]
    for _ in range(2):
        graph.replay()
    assert all(bool((other == 7).all()) for other in others)
    for p, b in zip(params, before, strict=True):
        assert torch.equal(p.detach(), b - 2)
    assert tables() == 1
    del graph
    assert becomes(tables, 0, fusedopt.SGD(params, lr=1.0).step)


def test_a_capture_that_fails_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = tables_of_graphs(monkeypatch)
    twins = Twins(CLASSES[0]).step(2)

    def step_and_fail() -> None:
        twins.ours.step()
        raise KeyError

    with nothing_written(twins.ours), pytest.raises(KeyError), capture(new_graph()):
        step_and_fail()
    assert becomes(tables, 0, lambda: twins.step(1))
    graph = new_graph()
    with capture(graph):
        twins.ours.step()
    graph.replay()
    twins.stock.step()
    assert_same(*twins)


@only_fake
@pytest.mark.parametrize("captured", [False, True], ids=["as_usual", "captured"])
def test_a_failure_between_devices_does_not_reach_a_replay(
    captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured is forgotten by the step that fails, as a replay cannot know of it."""
    params = [Parameter(torch.ones(5, device=f"{DEVICE.type}:{i}")) for i in range(2)]
    optimizer = fusedopt.SGD(params, lr=1.0, nonfinite="skip")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    graph, failed = new_graph(), new_graph()
    with capture(graph):
        optimizer.step()

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    for p in params:
        p.grad.fill_(math.nan)
    with monkeypatch.context() as patch:
        patch.setattr(device, "combine", fail)
        place = capture(failed) if captured else nullcontext()
        with pytest.raises(torch.OutOfMemoryError), place:
            optimizer.step()
    if captured:
        failed.replay()
    for p in params:
        p.grad.fill_(1)
    graph.replay()
    assert int(optimizer.skipped_steps) == 0
    assert all(bool((p == -1).all()) for p in params)


@every_class
def test_capturing_the_first_step_is_refused(case: Case) -> None:
    params = make_params()
    optimizer = case.ours(params)
    set_grads(params, 0)
    with (
        nothing_written(optimizer),
        pytest.raises(RuntimeError, match="take one step before"),
        capture(new_graph()),
    ):
        optimizer.step()
    optimizer.step()


def test_raising_cannot_be_captured() -> None:
    params = make_params()
    optimizer = fusedopt.SGD(params, lr=0.1, nonfinite="raise")
    set_grads(params, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="nonfinite='raise'"), capture(new_graph()):
        optimizer.step()


@classes("SGD", "Momentum", "Adagrad")
def test_capturable_is_unknown_where_stock_does_not_know_it(case: Case) -> None:
    with pytest.raises(TypeError, match="capturable"):
        case.ours(make_params(), capturable=True)


@classes("AdamW", "Adam", "RMSprop")
def test_capturable_is_stocks_word_for_graphs(case: Case) -> None:
    params = make_params()
    optimizer = case.ours(params, capturable=True, max_grad_norm=1.0)
    set_grads(params, 0)
    optimizer.step()
    graph = new_graph()
    with capture(graph):
        optimizer.step()
    graph.replay()
    assert all(state["step"] == 2 for _, state in contents_of(optimizer))


@every_class
def test_found_inf_on_the_first_step(case: Case) -> None:
    """The scaler's verdict is obeyed on the device, and the step after it is the first."""
    params, others = make_params(), make_params()
    ours, reference = case.ours(params), case.ours(others)
    for step in range(4):
        set_grads(params, step)
        set_grads(others, step)
        ours.grad_scale, ours.found_inf = number(4.0), number(float(step == 0))
        for p in params:
            p.grad.mul_(4)
        with no_waiting():
            ours.step()
        del ours.grad_scale, ours.found_inf
        if step > 0:
            reference.step()
        else:
            assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    torch.testing.assert_close(contents_of(ours), contents_of(reference), rtol=0, atol=0)
    assert ours.skipped_steps.device.type == DEVICE.type
    assert int(ours.skipped_steps) == 1


@table("bad", {"nan": math.nan, "inf": math.inf})
@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_nonfinite_gradients(bad: float, policy: str) -> None:
    params = mixed_params()
    optimizer = fusedopt.AdamW(params, nonfinite=policy)
    set_grads(params, 0)
    optimizer.step()
    set_grads(params, 1)
    params[9].grad[16] = params[21].grad[3] = bad
    with nothing_written(optimizer):
        if policy == "raise":
            with pytest.raises(RuntimeError, match="parameter 9 of group 0: its gradient holds"):
                optimizer.step()
        else:
            with no_waiting():
                optimizer.step()
    assert int(optimizer.skipped_steps) == 1
    assert not math.isfinite(optimizer.grad_norm)
    set_grads(params, 2)
    optimizer.step()
    assert int(optimizer.skipped_steps) == 1
    assert all(state["step"] == 2 for _, state in contents_of(optimizer))
    assert int(copy.deepcopy(optimizer).skipped_steps) == 1


@every_class
@table(
    "places",
    {
        "two_devices": (0, 1),
        "with_the_cpu": ("cpu", 0),
        "everywhere": (1, "cpu", 0),
    },
)
def test_several_places(case: Case, places: tuple[Any, ...]) -> None:
    """One norm, and one decision, for parameters in several places."""
    if 1 in places and one_device:
        pytest.skip("needs several GPUs")
    spread = [
        Parameter(
            p.detach().to(
                places[i % len(places)]
                if places[i % len(places)] == "cpu"
                else f"{DEVICE.type}:{places[i % len(places)]}"
            )
        )
        for i, p in enumerate(make_params(SIZES))
    ]
    alone = on_cpu(spread)
    options = {"max_grad_norm": 0.5, "nonfinite": "skip"}
    for norm_type in (2.0, math.inf):
        ours = case.ours(spread, **options, grad_norm_type=norm_type)
        reference = case.ours(alone, **options, grad_norm_type=norm_type)
        for step in range(5):
            set_grads(spread, step)
            set_grads(alone, step)
            if step in (1, 3):
                for params in (spread, alone):
                    params[step + 1].grad.view(-1)[0] = math.nan
            if step == 4:
                for optimizer, place in ((ours, DEVICE), (reference, "cpu")):
                    optimizer.grad_scale = torch.tensor(0.5, device=place)
                    optimizer.found_inf = torch.tensor(0.0, device=place)
            ours.step()
            reference.step()
            assert float(ours.grad_norm) == pytest.approx(float(reference.grad_norm), nan_ok=True)
            assert int(ours.skipped_steps) == int(reference.skipped_steps)
        for p, q in zip(spread, alone, strict=True):
            torch.testing.assert_close(p.detach().cpu(), q.detach())
        assert int(ours.skipped_steps) == 2


@several
def test_a_failure_between_devices_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """When both have measured, but nobody has put the parts of the norm together."""
    params = [Parameter(torch.ones(5, device=f"{DEVICE.type}:{i}")) for i in range(2)]
    optimizer = fusedopt.SGD(params, lr=1.0, nonfinite="skip")

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    for value in (1.0, math.nan, 2.0):
        for p in params:
            p.grad = torch.full_like(p, value)
        if not math.isnan(value):
            optimizer.step()
            continue
        with monkeypatch.context() as patch:
            patch.setattr(device, "combine", fail)
            with nothing_written(optimizer), pytest.raises(torch.OutOfMemoryError):
                optimizer.step()
    assert int(optimizer.skipped_steps) == 0
    assert all(bool((p == -2).all()) for p in params)


@several
def test_the_learning_rate_on_another_device() -> None:
    params = make_params()
    there = [Parameter(p.detach().to(f"{DEVICE.type}:1")) for p in params]
    rate = torch.tensor(0.25, device=f"{DEVICE.type}:0")
    optimizer = fusedopt.SGD([*params, *there], lr=rate)
    before = [p.detach().clone() for p in params]
    for p in (*params, *there):
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p, q, b in zip(params, there, before, strict=True):
        torch.testing.assert_close(p.detach(), b - 0.25)
        torch.testing.assert_close(q.detach().to(p.device), b - 0.25)


@every_class
def test_checkpoints_travel(case: Case) -> None:
    """From the CPU to a device and back, ours and stock's, in the middle of a run."""
    here = on_cpu(make_params())
    first = case.stock(here)
    reference = case.stock(on_cpu(make_params()))
    optimizers = [first, None, None, None]
    models = [here, make_params(), on_cpu(make_params()), make_params()]
    kinds = [case.stock, case.ours, case.ours, case.stock]
    for turn in range(4):
        if turn:
            optimizers[turn] = kinds[turn](models[turn])
            with torch.no_grad():
                for p, q in zip(models[turn], models[turn - 1], strict=True):
                    p.copy_(q)
            optimizers[turn].load_state_dict(copy.deepcopy(optimizers[turn - 1].state_dict()))
        for step in range(3):
            for optimizer in (optimizers[turn], reference):
                set_grads(params_of(optimizer), 3 * turn + step)
                optimizer.step()
    for p, q in zip(models[3], params_of(reference), strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach())


@pytest.mark.parametrize("skipped", [False, True])
def test_momentum_of_stock_is_no_first_step(skipped: bool) -> None:
    """Also when a counter is new, and the device has skipped the first step of ours."""
    updated = []
    for place in ("cpu", DEVICE):
        param = Parameter(torch.ones(5, device=place))
        options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
        stock = torch.optim.SGD([param], **options)
        ours = fusedopt.SGD([param], **options, ema_decay=0.9, ema_warmup=True, nonfinite="skip")
        for optimizer in (stock, stock, ours, ours):
            if optimizer is ours and not ours.state:
                ours.load_state_dict(stock.state_dict())
                if skipped:
                    param.grad = torch.full_like(param, math.nan)
                    ours.step()
                    ours.load_state_dict(ours.state_dict())
            param.grad = torch.ones_like(param)
            optimizer.step()
        updated.append([v.cpu() for v in (param.detach(), ours.state[param]["momentum_buffer"])])
    torch.testing.assert_close(updated[1], updated[0])


@every_class
def test_a_checkpoint_resumes_to_the_bit(case: Case) -> None:
    params = make_params(dtype=torch.bfloat16)
    options = {"weight_precision": "stochastic", "ema_decay": 0.9}
    optimizer = case.ours(params, **options)
    for step in range(3):
        set_grads(params, step)
        optimizer.accumulate()
        if step != 2:
            optimizer.step()
    others = [Parameter(p.detach().clone()) for p in params]
    resumed = case.ours(others, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for run in (optimizer, resumed):
        run.step()
        set_grads(params_of(run), 3)
        run.step()
    torch.testing.assert_close(contents_of(optimizer), contents_of(resumed), rtol=0, atol=0)


def test_errors_name_the_device() -> None:
    params = make_params()
    optimizer = fusedopt.AdamW(params)
    set_grads(params, 0)
    optimizer.step()
    optimizer.state[params[1]]["exp_avg"] = optimizer.state[params[1]]["exp_avg"].cpu()
    with (
        nothing_written(optimizer),
        pytest.raises(RuntimeError, match=r"parameter 1 .*state\['exp_avg'\] is on another device"),
    ):
        optimizer.step()


def test_counters_may_come_from_the_cpu() -> None:
    """Where stock, unless it is fused or capturable, keeps them."""
    params = make_params()
    optimizer = fusedopt.Adam(params)
    set_grads(params, 0)
    optimizer.step()
    for p in params:
        optimizer.state[p]["step"] = torch.tensor(7.0, device="cpu")
    optimizer.step()
    assert all(
        state["step"] == 8 and state["step"].device.type == DEVICE.type
        for _, state in contents_of(optimizer)
    )


def test_momentum_in_8_bits_starts_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was in the memory that the host has set aside for it."""
    like = fusedopt.optimizers.like
    monkeypatch.setattr(fusedopt.optimizers, "like", lambda p, dtype: like(p, dtype).fill_(5))
    (p,) = params = [Parameter(torch.zeros(300))]
    optimizer = fusedopt.SGD(params, lr=1.0, momentum=0.9, state_dtype=torch.uint8)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert (p == -1).all()


@pytest.mark.parametrize("steps", [None, 5.0], ids=["uncounted", "counted"])
def test_a_buffer_that_is_none_starts_anew(steps: float | None) -> None:
    """As in stock, whose fused step leaves None when it skips the first; ours may have counted."""
    twins = Twins(CLASSES[-1])
    for p in params_of(twins.stock):
        twins.stock.state[p]["momentum_buffer"] = None
    for p in params_of(twins.ours):
        twins.ours.state[p]["momentum_buffer"] = None
        if steps is not None:
            twins.ours.state[p]["step"] = torch.tensor(steps)
    twins.step(2)


def test_gradient_scaler() -> None:
    """torch's own, over steps of which one overflows."""
    params = make_params()
    recipe = Recipe(CLASSES[1], params, nonfinite="skip")
    optimizer = CLASSES[1].ours(params)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0, growth_interval=100)
    for step in range(5):
        set_grads(params, step)
        for p in params:
            p.grad = p.grad.to(p.dtype)
        if step == 2:
            params[0].grad.view(-1)[0] = math.inf
        recipe.step([[p.grad.clone() for p in params]])
        scale = scaler.scale(number(1.0))
        for p in params:
            p.grad.mul_(scale)
        scaler.step(optimizer)
        scaler.update()
    for p, q in zip(params, recipe.params, strict=True):
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=1e-5, atol=1e-6)
    assert int(optimizer.skipped_steps) == 1


def test_weights_in_other_forms_are_made_on_the_device() -> None:
    """Options switched in the middle of a run, also those that need the weight's hidden part."""
    params = make_params(dtype=torch.bfloat16)
    optimizer = fusedopt.AdamW(params, lr=0.01, weight_precision="kahan", state_dtype=torch.uint8)
    for step, precision in enumerate(["kahan", "remainder", "master", "kahan", "nearest"]):
        optimizer.weight_precision = precision
        set_grads(params, step)
        optimizer.step()
        for p, state in contents_of(optimizer):
            shaped = [v for k, v in state.items() if k not in ("step", "seed", "grad_count")]
            assert {v.device for v in shaped} == {p.device}
    optimizer.state_dtype = torch.float32
    optimizer.step()


def test_groups_move_and_grow() -> None:
    """The table in device memory follows the groups."""
    twins = Twins(Case("SGD", {"lr": 0.1, "momentum": 0.9}), lambda: make_params([(40,)] * 6)).step(
        2
    )
    twins.each(lambda o, _: o.add_param_group({"params": make_params([(9,), (300,)]), "lr": 0.5}))
    twins.step(2)

    def regroup(optimizer: torch.optim.Optimizer, _: list[Tensor]) -> None:
        first, second = optimizer.param_groups
        second["params"].insert(0, first["params"].pop())

    twins.each(regroup)
    twins.step(2)
    twins.each(lambda o, _: o.param_groups.pop())
    twins.step(2)
    assert_same(*twins)


@only_cuda
def test_side_streams() -> None:
    """Steps on the streams of the caller, which may be a new one each time."""
    params, others = make_params([(100_000,)] * 4), make_params([(100_000,)] * 4)
    ours, reference = (
        fusedopt.AdamW(params, max_grad_norm=1.0),
        fusedopt.AdamW(others, max_grad_norm=1.0),
    )
    for step in range(20):
        set_grads(others, step)
        reference.step()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)
            set_grads(params, step)
            ours.step()
        torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(contents_of(ours), contents_of(reference), rtol=0, atol=0)


@only_cuda
def test_more_than_2_to_the_31_elements() -> None:
    n = 2**31 + 259
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of device memory")
    param = Parameter(torch.ones(n, dtype=torch.bfloat16, device=DEVICE))
    param.grad = torch.ones_like(param)
    optimizer = fusedopt.SGD([param], lr=0.5, momentum=0.5, max_grad_norm=math.inf)
    optimizer.step()
    weight = param.detach()
    assert bool((weight == 0.5).all())
    assert float(optimizer.grad_norm) == pytest.approx(math.sqrt(n), rel=1e-12)
    param.grad[-1] = 2
    optimizer.step()
    assert float(weight[-1]) == 0.5 - 0.5 * 2.5
    assert float(weight[-2]) == 0.5 - 0.5 * 1.5
    assert bool((weight[:-1] == weight[0]).all())


@only_cuda
def test_memory_is_torchs() -> None:
    """All that a step needs on the device shows in torch's statistics, and goes with it."""

    def others() -> int:
        """Bytes in use that torch has not allocated: contexts, code, and what went past it."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()

    params = make_params([(1000,)] * 5000)
    set_grads(params, 0)
    fusedopt.SGD(params, lr=0.1, max_grad_norm=1.0).step()  # loads the kernels
    before = torch.cuda.memory_allocated(), others()
    optimizer = fusedopt.SGD(params, lr=0.1, max_grad_norm=1.0)
    optimizer.step()
    # The table of so many tasks takes more than a megabyte.
    assert torch.cuda.memory_allocated() > before[0] + 2**20
    assert others() == before[1]
    del optimizer
    assert torch.cuda.memory_allocated() == before[0]


@only_cuda
@every_class_with(
    {"plain": {}, "clip": {"max_grad_norm": 1.0}, "8_bits": {"state_dtype": torch.uint8}}
)
def test_a_step_needs_no_memory_for_itself(case: Case, options: dict[str, Any]) -> None:
    """Beside state and a table of the tensors, which stay."""
    # (Of larger ones torch may set aside more than it was asked for.)
    params = make_params([(100_000,)] * 20)
    set_grads(params, 0)
    before = torch.cuda.memory_allocated()
    optimizer = case.ours(params, **options)  # Adagrad's makes state
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    state = [v for _, state in contents_of(optimizer) for v in state.values() if v.is_cuda]
    table = torch.cuda.memory_allocated() - before - sum(allocated(v) for v in state)
    assert 0 < table < 200_000  # the norm's parts are of all warps that a GPU may have
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated()
    for _ in range(3):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        assert torch.cuda.max_memory_allocated() == before


def allocated(tensor: Tensor) -> int:
    """Bytes that torch's allocator sets aside for a tensor."""
    return -(-tensor.nbytes // 512) * 512
