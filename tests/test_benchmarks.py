"""Smoke tests of the benchmarks. None of them looks at a time."""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode

import fusedopt
from fusedopt import parity_command
from fusedopt.bench import (
    BenchError,
    command,
    contenders,
    machine,
    measure,
    memory,
    plot,
    race,
    report,
)
from fusedopt.bench.contenders import CONTENDERS, CPU, OPTIMIZERS, Case, Gradients, Peer
from fusedopt.extension import kernels
from fusedopt.models import MODELS, Model, find

pytestmark = pytest.mark.skipif(
    DEVICE.type != "cpu",
    reason="measures on the CPU, whose step counters torch puts on the default device",
)

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = Model("small", ((5, 3), (200,), ()))
EFFORT = race.Effort(passes=1, rounds=4, budget=0.01)


class FakeMachine:
    """A clock that only steps advance; exact, because it counts in fractions of a second."""

    def __init__(self) -> None:
        self.now = Fraction(0)
        self.log: list[str] = []

    def clock(self) -> Fraction:
        return self.now

    def step(self, name: str, seconds: list[Fraction]):
        """A contender whose steps take these times, the last one forever."""
        remaining = iter(seconds)

        def step() -> None:
            self.log.append(name)
            self.now += next(remaining, seconds[-1])

        return step


def milliseconds(*values: int) -> list[Fraction]:
    return [Fraction(value, 1000) for value in values]


def test_rounds_report_the_mean_of_the_timed_steps_only() -> None:
    machine = FakeMachine()
    # Two steps before, one to calibrate by: 15 ms, so two timed steps in each turn of 30 ms. Each
    # turn begins with an untimed step.
    preparation = milliseconds(900, 500, 15)
    turns = milliseconds(700, 10, 20, 700, 30, 30, 700, 20, 40, 700, 30, 50)
    timing = measure.rounds(
        {"a": machine.step("a", preparation + turns)}, count=4, clock=machine.clock
    )["a"]
    assert timing == measure.Timing(dict(enumerate(milliseconds(15, 30, 30, 40))), steps=8)
    assert timing.spread.median == Fraction(30, 1000)
    # Three tenths of the way from the first to the next, and as far from the last.
    assert timing.spread.low == Fraction(39, 2000)
    assert timing.spread.high == Fraction(37, 1000)


def test_order_rotates() -> None:
    machine = FakeMachine()
    steps = {name: machine.step(name, milliseconds(30)) for name in "abc"}
    measure.rounds(steps, count=4, clock=machine.clock)
    calibration = "".join(3 * name for name in "abc")
    assert "".join(machine.log) == calibration + "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc"


@pytest.mark.parametrize(("step_ms", "steps"), [(1, 20), (2, 15), (20, 2), (31, 1), (400, 1)])
def test_steps_per_turn(step_ms: int, steps: int) -> None:
    machine = FakeMachine()
    contender = machine.step("a", milliseconds(step_ms))
    timing = measure.rounds({"a": contender}, count=5, clock=machine.clock)["a"]
    assert timing.steps == 5 * steps


def test_slow_contenders_take_part_in_fewer_rounds() -> None:
    machine = FakeMachine()
    steps = {
        "fast": machine.step("fast", milliseconds(30)),
        "slow": machine.step("slow", milliseconds(500)),  # two steps a turn: 5 s last for 5 turns
        "slowest": machine.step("slowest", milliseconds(60_000)),
    }
    timings = measure.rounds(steps, count=15, budget=15, clock=machine.clock)
    assert {name: list(timing.rounds) for name, timing in timings.items()} == {
        "fast": list(range(15)),
        "slow": [0, 2, 4, 6, 8, 10, 12, 14],  # at least five
        "slowest": [0, 4, 8, 12],  # at least two
    }


def test_ratio_is_taken_round_by_round() -> None:
    # The machine becomes ten times slower, the ratio stays.
    a = measure.Timing(dict(enumerate((2.0, 4.0, 20.0, 40.0, 80.0))), steps=1)
    b = measure.Timing({0: 1.0, 2: 10.0, 4: 40.0}, steps=5)
    assert measure.ratio(a, b) == measure.Spread(2.0, 2.0, 2.0)
    assert measure.ratio(b, a) == measure.Spread(0.5, 0.5, 0.5)


def test_passes_are_put_together() -> None:
    a = [measure.Timing(times, steps=6) for times in ({0: 2.0, 1: 9.0}, {0: 40.0, 1: 80.0})]
    b = [measure.Timing(times, steps=1) for times in ({0: 1.0}, {0: 10.0})]
    both = measure.together(a)
    assert both.spread.median == (9 + 40) / 2
    assert both.steps == 12
    # Each pass's ratios, of the rounds that both took part in.
    assert measure.ratio(both, measure.together(b)) == measure.Spread(3.0, 2.2, 3.8)


# --- cases ---


@pytest.mark.parametrize(
    ("optimizer", "dtype", "clip", "per_element"),
    [
        ("adamw", None, False, 28),
        ("adamw", None, True, 32),
        ("adam", torch.bfloat16, False, 14),
        ("sgd", None, False, 20),
        ("rmsprop", torch.float64, True, 48),
    ],
)
def test_bytes_that_a_step_must_move(
    optimizer: str, dtype: torch.dtype | None, clip: bool, per_element: int
) -> None:
    case = Case(SMALL, OPTIMIZERS[optimizer], dtype=dtype, clip=clip)
    assert case.bytes_per_step == per_element * 216


def test_a_model_keeps_its_own_dtypes_unless_told_otherwise() -> None:
    model = Model("mixed", ((2,), (3,)), (torch.bfloat16, torch.float32))
    own = Case(model, OPTIMIZERS["sgd"])
    assert [t.dtype for t in Gradients(own).tensors] == [torch.bfloat16, torch.float32]
    assert own.bytes_of_parameters == 2 * 2 + 3 * 4
    told = Case(model, OPTIMIZERS["sgd"], dtype=torch.float16)
    assert [t.dtype for t in Gradients(told).tensors] == 2 * [torch.float16]


def test_gradients_move_as_in_a_backward_pass() -> None:
    gradients = Gradients(Case(Model("m", ((300,),), group_each=True), OPTIMIZERS["sgd"]))
    (first,), (second,) = (group["params"] for _ in range(2) for group in gradients.parameters())
    before = first.grad
    assert second.grad is before
    gradients.move()
    assert first.grad is second.grad
    assert first.grad.data_ptr() != before.data_ptr()
    assert torch.equal(first.grad, before)


def test_host_time_is_of_steps_whose_gradients_have_moved() -> None:
    gradients = Gradients(Case(SMALL, OPTIMIZERS["sgd"]))
    params = gradients.parameters()
    seen = [params[1].grad.data_ptr()]
    now = machine.clock(torch.device("cpu"))
    machine.host_seconds(
        lambda: seen.append(params[1].grad.data_ptr()), gradients.move, now, budget=0
    )
    assert len(seen) == 4  # three steps, and none had the gradients where the one before had them
    assert all(a != b for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", [False, True])
def test_contenders_do_the_same(optimizer: str, clip: bool) -> None:
    case = Case(SMALL, OPTIMIZERS[optimizer], clip=clip)

    def updated(name: str) -> torch.Tensor:
        gradients = Gradients(case)
        step = CONTENDERS[name](case, gradients)
        for _ in range(3):
            step()
        (params,) = gradients._params
        assert not any(torch.equal(p, g) for p, g in zip(params, gradients.tensors, strict=True))
        return torch.cat([p.detach().flatten() for p in params])

    expected = updated("for-loop")
    for name in ("foreach", "fused", "ours"):
        if (name, optimizer) == ("fused", "rmsprop"):
            with pytest.raises(contenders.AbsentError):
                updated(name)
        else:
            torch.testing.assert_close(updated(name), expected, msg=name)


def test_the_copy_moves_as_many_bytes_as_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Copied(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.copy_.default:
                self.count += args[0].nbytes
            return func(*args, **(kwargs or {}))

    case = Case(SMALL, OPTIMIZERS["adamw"])
    for at_once in (500, 1 << 30):
        monkeypatch.setattr(contenders, "COPIED_AT_ONCE", at_once)
        with Copied() as copied:
            contenders.copy(case.bytes_per_step, case.device)()
        assert 2 * copied.count == case.bytes_per_step


# --- peers ---

TOY = """
import torch
from torch.optim import SGD as Right

class Wrong(Right):
    def step(self):
        super().step()
        super().step()

class Failing(Right):
    def step(self):
        raise RuntimeError("cannot compile\\nbecause of\\nmany lines")

class Writing(Right):
    def step(self):
        super().step()
        self.param_groups[0]["params"][0].grad.zero_()

class Loud(Right):
    def __init__(self, *args, **options):
        print("compiling ...")
        super().__init__(*args, **options)
"""


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("toy_peer:Right", ""),
        ("toy_peer:Loud", ""),
        ("toy_peer:Wrong", "its sgd is another one than torch's"),
        ("toy_peer:Writing", "its sgd overwrites gradients; contenders share them"),
        ("toy_peer:Failing", "RuntimeError: cannot compile"),
        ("toy_peer:Nothing", "AttributeError: module 'toy_peer' has no attribute 'Nothing'"),
        ("toy_broken:Right", "ModuleNotFoundError: No module named 'something_else'"),
        ("toy_leaving:Right", "SystemExit: 3"),
        ("toy_absent:Right", "not installed"),
    ],
)
def test_peers_take_part_when_they_do_the_same(
    path: str,
    fault: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "toy_peer.py").write_text(TOY)
    (tmp_path / "toy_broken.py").write_text("import something_else")
    (tmp_path / "toy_leaving.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(contenders, "PEERS", (Peer("toy", path, {"sgd": {}}, ("cpu",)),))
    monkeypatch.setitem(CONTENDERS, "toy", functools.partial(contenders._peer, "toy"))
    contenders._fault.cache_clear()
    case = Case(SMALL, OPTIMIZERS["sgd"])
    row = race.result(case, [race.measure(case, ["toy", "ours"], EFFORT, details=False)])
    assert ("toy" in row["contenders"]) == (not fault)
    assert row["absent"] == ({"toy": fault} if fault else {})
    case = Case(SMALL, OPTIMIZERS["adam"])
    other = race.result(case, [race.measure(case, ["toy", "ours"], EFFORT, details=False)])
    assert other["absent"] == {"toy": "has no adam for cpu"}
    assert capfd.readouterr().out == ""


def test_peers_are_optimizers_that_there_are() -> None:
    for peer in PEERS_THERE_ARE:
        assert peer.optimizers.keys() <= OPTIMIZERS.keys()
        assert peer.name in CONTENDERS
        assert set(peer.devices) <= {"cpu", "cuda"}
    found = [(p.name, o, d) for p in PEERS_THERE_ARE for o in p.optimizers for d in p.devices]
    assert len(found) == len(set(found))


PEERS_THERE_ARE = contenders.PEERS


def test_what_fails_at_its_first_step_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_nothing(step: Any) -> Any:
        def fail() -> None:
            raise RuntimeError("no compiler\nfound")

        return fail

    monkeypatch.setattr(torch, "compile", compile_nothing)
    case = Case(SMALL, OPTIMIZERS["sgd"])
    row = race.result(case, [race.measure(case, ["fused", "compiled", "ours"], EFFORT)])
    assert row["absent"] == {"compiled": "RuntimeError: no compiler"}
    assert row["contenders"].keys() == {"fused", "ours"}
    assert row["contenders"]["ours"]["host_ms"] > 0


# --- the command ---


@pytest.fixture
def one_thread():
    """One thread has no barriers to wait at, however busy the machine is with other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bench(one_thread: None, capsys: pytest.CaptureFixture[str]):
    """Runs the command; returns what it prints."""

    def run(*arguments: str) -> str:
        command.main(arguments)
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    """Runs the command, which has to give up with a sentence; returns that."""

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as error:
            command.main(arguments)
        assert error.value.code == 2
        *usage, sentence = capsys.readouterr().err.splitlines()
        assert usage in ([], ["usage: fusedopt bench [options]"])
        return sentence.partition("error: ")[2] or sentence.removeprefix("fusedopt bench: ")

    return run


def run(*command: str, path: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **({"PYTHONPATH": path} if path else {})},
    )


def test_bench_tells_in_a_table_json_csv_and_a_plot(bench, tmp_path: Path) -> None:
    files = {kind: str(tmp_path / f"out.{kind}") for kind in ("json", "csv", "png")}
    printed = bench(
        *("--quick", "--model", "1000x64", "--optimizer", "rmsprop", "sgd", "--clip"),
        *("--json", files["json"], "--csv", files["csv"], "--plot", files["png"]),
    )
    assert printed.count("\n1000x64 (") == 2
    assert printed.count("\n1000x64, clipped (") == 2
    assert "absent: fused (torch's rmsprop has no fused=True)" in printed

    found = json.loads(Path(files["json"]).read_text())
    assert {"date", "commit", "cpu", "isa", "load_average", "device"} <= found.keys()
    assert found["threads"] == 1
    assert {"fusedopt", "torch", "python"} <= found["versions"].keys()
    rmsprop, _, sgd, clipped = found["results"]
    assert (rmsprop["optimizer"], sgd["optimizer"]) == ("rmsprop", "sgd")
    assert (sgd["clip"], clipped["clip"]) == (False, True)
    assert sgd["bytes_per_step"] == 20 * 64_000
    assert sgd["dtype"] == "float32"
    assert min(sgd["copy_gb_per_s"]) > 0
    assert {"for-loop", "foreach", "fused", "ours", "limit"} <= sgd["contenders"].keys()
    assert {"DeepSpeed", "fused"} <= rmsprop["absent"].keys()
    for contender in sgd["contenders"].values():
        assert contender["rounds"] >= measure.MIN_ROUNDS
        assert contender["gb_per_s"] > 0
        assert min(sgd["copy_gb_per_s"]) > 0
        assert contender["host_ms"] > 0
        assert contender["ms"].keys() == {"median", "low", "high"}
    assert {"torch's best", "for-loop", "foreach", "fused", "limit"} <= sgd[
        "time_relative_to_ours"
    ].keys()

    with open(files["csv"], newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(len(row["contenders"]) for row in found["results"])
    assert float(lines[0]["ms_median"]) == rmsprop["contenders"]["for-loop"]["ms"]["median"]
    assert Path(files["png"]).read_bytes().startswith(b"\x89PNG")

    again = str(tmp_path / "again")
    assert bench("--from", files["json"], "--csv", f"{again}.csv", "--plot", f"{again}.png") == (
        printed
    )
    assert Path(f"{again}.csv").read_text() == Path(files["csv"]).read_text()
    assert Path(f"{again}.png").read_bytes() == Path(files["png"]).read_bytes()


def test_the_largest_case_is_also_measured_for_memory(bench, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch.nn import Linear\ndef net(): return Linear(99, 9)"
    )
    out = tmp_path / "out.json"
    arguments = ["--model", "mine:net", "--optimizer", "sgd", "--contender", "foreach"]
    done = subprocess.run(
        [sys.executable, "-m", "fusedopt", "bench", *arguments, "--rounds", "2", "--json", out],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["results"]
    assert (row["case"], row["elements"]) == ("mine:net", 900)
    assert row["contenders"].keys() == {"foreach", "ours"}  # without which there are no ratios
    assert all("extra_bytes" in found for found in row["contenders"].values())


def test_memory_that_a_step_takes() -> None:
    case = Case(Model("m", 8 * ((500_000,),)), OPTIMIZERS["adamw"])
    # One temporary for each parameter, all at once.
    assert memory.step_bytes(case, "foreach") == pytest.approx(case.bytes_of_parameters, rel=0.5)
    assert memory.step_bytes(case, "ours") < case.bytes_of_parameters / 10
    with pytest.raises(RuntimeError, match="has no rmsprop"):
        memory.step_bytes(Case(SMALL, OPTIMIZERS["rmsprop"]), "DeepSpeed")


def test_a_script_without_a_guard_runs_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "print('begun')\n"
        "from fusedopt.bench import command\n"
        "command.main('--model 1000x64 --optimizer sgd --contender ours --rounds 2'.split())\n"
    )
    done = run(str(script), path=os.pathsep.join(sys.path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("begun") == 1
    assert done.stdout.count("extra MB") == 1
    line = next(line for line in done.stdout.splitlines() if line.startswith("  ours "))
    assert len(line.split()) == 6  # the last is the memory


def test_dtype_and_rounds(bench, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    bench(
        *("--model", "1000x64", "--optimizer", "AdamW", "--contender", "foreach", "limit"),
        *("--quick", "--dtype", "bfloat16", "--json", str(out)),
        *("--passes", "2", "--rounds", "3", "--budget", "9"),
    )
    (row,) = json.loads(out.read_text())["results"]
    assert row["dtype"] == "bfloat16"
    assert row["bytes_per_step"] == 14 * 64_000
    assert {found["rounds"] for found in row["contenders"].values()} == {6}
    assert len(row["copy_gb_per_s"]) == 2


def test_curves(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curves = {name: models[:2] for name, models in race.curves().items()}
    monkeypatch.setattr(race, "curves", lambda: curves)
    out, image = tmp_path / "out.json", tmp_path / "out.png"
    few = ("--model", "1000x64", "--optimizer", "sgd", "--contender", "foreach", "fused", "--quick")
    printed = bench(*few, "--scaling", "--json", str(out), "--plot", str(image))
    assert "against the number of groups" in printed
    points = json.loads(out.read_text())["scaling"]
    assert [(p["against"], p["at"]) for p in points] == [
        *[("elements", 1000), ("elements", 3000), ("tensors", 1), ("tensors", 3)],
        *[("groups", 1), ("groups", 3)],
    ]
    assert all(p["contenders"].keys() == {"foreach", "fused", "ours"} for p in points)
    assert bench("--from", str(out)) == printed
    assert image.exists()

    monkeypatch.setattr(command, "CURVE", -1)
    assert "stops here: no time for more" in bench(*few, "--scaling")


def test_curves_are_as_long_as_they_should_be() -> None:
    ends = {
        name: (models[0].elements, models[-1].elements) for name, models in race.curves().items()
    }
    assert ends["elements"] == (10**3, 10**8)
    assert ends["tensors"] == (64, 64 * 10**4)
    assert ends["groups"] == (64, 64 * 10**3)
    assert all(model.group_each for model in race.curves()["groups"])


@pytest.mark.parametrize("models", [("1000x64", "1000x64-groups"), ("1000x64", "3000x3500", "x")])
def test_ctrl_c_leaves_what_was_measured(
    models: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    """In the second pass, or, with three models, in the first, when no table is there yet."""
    calls = []

    def measure_twice(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    real = race.measure
    monkeypatch.setattr(race, "measure", measure_twice)
    monkeypatch.setitem(MODELS, "x", SMALL)
    out, image = tmp_path / "out.json", tmp_path / "out.png"
    arguments = [
        *("--quick", "--passes", "2", "--contender", "ours", "--optimizer", "sgd"),
        *("--model", *models, "--json", str(out), "--plot", str(image)),
    ]
    with pytest.raises(SystemExit) as error:
        command.main(arguments)
    assert error.value.code == 130
    printed = capsys.readouterr()
    sentence = f"fusedopt bench: interrupted; what was measured is in {out}, {image}"
    assert printed.err.splitlines()[-1] == sentence
    tables = printed.out.partition("interrupted; what was measured:")[2]
    assert [row["case"] for row in json.loads(out.read_text())["results"]] == list(models[:2])
    assert all(tables.count(f"\n{model} (") == 1 for model in models[:2])
    assert image.read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "environment", stop)
    with pytest.raises(SystemExit) as error:
        command.main(["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")])
    assert error.value.code == 130
    assert capsys.readouterr().err == "fusedopt bench: interrupted; nothing was measured\n"
    assert not list(tmp_path.iterdir())


def test_files_are_tried_before(refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("measured before")

    monkeypatch.setattr(command, "_measure", fail)
    there = tmp_path / "there.json"
    there.write_text("mine")
    new = tmp_path / "new.csv"
    for name in ("--json", "--csv", "--plot"):
        sentence = refused("--json", str(there), "--csv", str(new), name, "/proc/out.png")
        assert sentence == "/proc/out.png: No such file or directory"
    assert there.read_text() == "mine"
    assert not new.exists()


KEYS_TO_LOSE = ["tensors", "bytes_per_step", "absent", "time_relative_to_ours", "elements"]


@pytest.mark.parametrize("key", KEYS_TO_LOSE)
def test_files_whose_rows_lack_something_are_refused(key: str, refused, tmp_path: Path) -> None:
    (path,) = (BENCHMARKS / "results").glob("cpu-*.json")
    found = json.loads(path.read_text())
    del found["results"][-1][key]
    (tmp_path / "a.json").write_text(json.dumps(found))
    sentence = refused("--from", str(tmp_path / "a.json"))
    assert sentence.endswith(f"not a JSON file of fusedopt bench (KeyError: '{key}')")


def test_a_file_nested_too_deeply_is_refused(refused, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(100_000 * "[")
    assert "not a JSON file of fusedopt bench" in refused("--from", str(tmp_path / "a.json"))


def test_the_version() -> None:
    done = run("-m", "fusedopt", "--version", path=os.pathsep.join(sys.path))
    assert (done.returncode, done.stdout) == (0, f"fusedopt {fusedopt.__version__}\n")


def test_every_contender_can_be_drawn(tmp_path: Path) -> None:
    (path,) = (BENCHMARKS / "results").glob("cpu-*.json")
    found = json.loads(path.read_text())
    row = found["results"][0]
    row["contenders"] = {name: row["contenders"]["ours"] for name in CONTENDERS}
    plot.draw({**found, "results": [row], "scaling": []}, tmp_path / "out.svg")
    colors = [plot._COLORS[name] for name in CONTENDERS if name not in ("ours", "limit")]
    assert len({*colors, plot._OURS}) == len(CONTENDERS) - 1


def test_what_a_model_leaves_out_is_told(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "x", Model("x", ((64,),), left_out="1 tensor of F8_E4M3"))
    printed = bench("--quick", "--model", "x", "--optimizer", "sgd", "--contender", "ours")
    assert "\nx (1 tensor, 64 elements of float32): " in printed
    assert "\n  left out: 1 tensor of F8_E4M3\n" in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--model nonsense", "no model 'nonsense'"),
        ("--model gone.safetensors", "gone.safetensors: no such file"),
        ("--model os:nothing", "os:nothing: AttributeError"),
        ("--optimizer nonsense", "'adagrad'"),
        ("--contender nonsense", "'DeepSpeed'"),
        ("--dtype int8", "'bfloat16'"),
        ("--device tpu", "--device tpu: it is cpu, cuda"),
        ("--device cpu:1", "--device cpu:1: it is cpu, cuda"),
        ("--device cuda:77", "--device cuda:77: torch finds"),
        ("--rounds 1", "'1' is no number from 2 on"),
        ("--passes 0", "'0' is no number from 1 on"),
        ("--rounds many", "'many' is no number from 2 on"),
        ("--budget nan", "'nan' is no positive number of seconds"),
        ("--budget -1", "'-1' is no positive number of seconds"),
        ("--json gone/out.json", "gone/out.json: No such file or directory"),
        ("--csv .", ".: Is a directory"),
        ("--plot out.nonsense", "out.nonsense: plots are"),
        ("--from gone.json", "gone.json: No such file"),
        ("--from pyproject.toml", "pyproject.toml: not a JSON file of fusedopt bench"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    arguments: str, sentence: str, refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(BENCHMARKS.parent)
    assert sentence in refused(*arguments.split())


def test_a_checkpoint_without_tensors_is_refused(refused, tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    assert "no tensors" in refused("--model", str(tmp_path / "empty.pt"))


def test_models_that_do_not_fit_are_refused_or_left_out(
    refused, bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "free_bytes", lambda device: 20_000_000)
    sentence = refused("--model", "1x50M", "--optimizer", "sgd")
    assert sentence.startswith("1x50M with sgd needs ")
    assert "0.0 GB of memory are free" in sentence
    printed = bench("--quick", "--optimizer", "sgd", "--contender", "limit")
    assert "left out: resnet50 with sgd needs" in printed
    assert "\n1000x64 (" in printed


def test_memory_needed() -> None:
    case = Case(MODELS["1x50M"], OPTIMIZERS["adamw"])
    # Two contenders with parameters and two states; gradients and temporaries, twice each.
    assert race.bytes_needed(case, ["foreach", "ours"]) == 200_000_000 * (2 * 3 + 4)
    assert machine.free_bytes(torch.device("cpu")) > 0


def test_plots_need_matplotlib(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    assert refused("--plot", "out.png") == "plots need matplotlib: pip install matplotlib"


@pytest.mark.parametrize("high", [0.99, 1.01])
def test_faster_peers_are_named(high: float) -> None:
    row = {
        "case": "large",
        "clip": True,
        "absent": {"a": "not installed", "b": "too old", "c": "not installed"},
        "time_relative_to_ours": {
            "limit": {"median": 0.5, "low": 0.4, "high": 0.6},
            "fused": {"median": 0.9, "low": 0.8, "high": high},
        },
    }
    faster = "fused is faster than ours on large, clipped: it takes 0.90 [0.80-0.99] of our time"
    assert list(report.remarks([row])) == [
        *([faster] if high < 1 else []),
        *("absent: a, c (not installed)", "absent: b (too old)"),
    ]


def test_a_machine_that_changed_is_told() -> None:
    rows = [{"copy_gb_per_s": [rate, 61.0]} for rate in (60.0, 105.0, 62.0)]
    (line,) = report.doubts({"results": rows, "load_average": 0.1})
    assert "60 to 105 GB/s" in line
    assert not list(report.doubts({"results": [{}, *rows[::2]], "load_average": 0.1}))


def test_a_busy_machine_is_told(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"results": [], "load_average": 2.01}
    assert not list(report.doubts({**told, "cpus": 5}))
    assert not list(report.doubts(told))  # older files have no number of processors
    (line,) = report.doubts({**told, "cpus": 4})
    assert "2.01 on 4 processors" in line
    assert "not to be relied on" in line
    monkeypatch.setattr(os, "getloadavg", lambda: (9.0, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    printed = bench("--quick", "--model", "1000x64", "--optimizer", "sgd", "--contender", "ours")
    assert "9.00 on 3 processors" in printed.splitlines()[-1]


def test_the_table_of_a_gpu_has_more_columns() -> None:
    ms = {"median": 1.0, "low": 1.0, "high": 1.0}
    found = {"ms": ms, "gb_per_s": 4000.0, "host_ms": 0.25, "device_ms": 0.75, "launches": 2}
    row = {
        **{"case": "m", "optimizer": "sgd", "device": "cuda:0", "dtype": "float32", "tensors": 1},
        **{
            "elements": 9,
            "bytes_per_step": 180,
            "contenders": {"ours": found | {"extra_bytes": 0}},
        },
        **{"absent": {}, "time_relative_to_ours": {}},
    }
    header = report.header("sgd", "cuda:0").splitlines()[-1]
    line = report.block(row).splitlines()[1]
    for title, cell in (("host, ms", "0.250"), ("device, ms", "0.750"), ("launches", "2")):
        end = header.index(title) + len(title)
        assert line[:end].endswith(f" {cell}")
    assert "launches" not in report.header("sgd", "cpu")


@pytest.mark.parametrize(
    "path", sorted((BENCHMARKS / "results").glob("c*.json")), ids=lambda path: path.stem
)
def test_committed_results_can_be_told_and_drawn(path: Path, tmp_path: Path) -> None:
    found = report.load(path)
    text = "\n".join(report.tables(found))
    for row in found["results"]:
        assert f"\n{report.label(row)} (" in text
    plot.draw(found, tmp_path / "out.png")
    report.write_csv(found, tmp_path / "out.csv")
    with pytest.raises(BenchError, match="no results to draw"):
        plot.draw({**found, "results": [], "scaling": []}, tmp_path / "out.png")


def test_what_the_page_says_is_in_the_results() -> None:
    """The numbers under "What it shows here", of which each is worked out from the results."""
    root = BENCHMARKS.parent
    page = " ".join((root / "docs" / "performance.md").read_text("utf-8").split())
    found = json.loads((BENCHMARKS / "results" / "cpu-avx512-2-threads.json").read_text("utf-8"))
    rows = {(row["optimizer"], row["case"]): row for row in found["results"]}

    def times(*names: str, cases: tuple[str, ...]) -> list[float]:
        """As long as ours, of all optimizers."""
        told = [row["time_relative_to_ours"] for (_, case), row in rows.items() if case in cases]
        return [row[name]["median"] for row in told for name in names if name in row]

    def per_tensor(case: str) -> dict[str, float]:
        """Microseconds with AdamW."""
        row = rows["adamw", case]
        return {n: c["ms"]["median"] * 1e3 / row["tensors"] for n, c in row["contenders"].items()}

    def at(against: str, count: int, name: str) -> float:
        """Microseconds on a curve."""
        (point,) = (p for p in found["scaling"] if (p["against"], p["at"]) == (against, count))
        return point["contenders"][name]["ms"]["median"] * 1e3

    def span(values: list[float], digits: int) -> str:
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}"

    large = ("1x50M", "gpt2-124m", "resnet50")
    assert f"torch's fused step ({span(times('fused', cases=large), 1)})" in page
    assert f"DeepSpeed's ({span(times('DeepSpeed', cases=large), 1)})" in page
    slow = times("for-loop", "foreach", cases=large)
    assert min(slow) == rows["momentum", "resnet50"]["time_relative_to_ours"]["for-loop"]["median"]
    assert max(slow) == rows["adamw", "gpt2-124m"]["time_relative_to_ours"]["foreach"]["median"]
    assert (
        f"{min(slow):.1f} times as long (momentum on ResNet-50, for-loop) to {max(slow):.1f}"
        in page
    )
    assert not any("is faster than ours" in line for line in report.remarks(rows.values()))

    few, many = per_tensor("1000x64"), per_tensor("10000x64")
    others = ("for-loop", "foreach", "fused", "DeepSpeed")
    cheapest, dearest = min(few[n] for n in others), max(few[n] for n in others)
    assert f"{cheapest:.1f} to {dearest:.0f} microseconds with AdamW; we {few['ours']:.2f}" in page
    assert f"{many['ours']:.1f} microseconds per tensor instead of {few['ours']:.2f}" in page
    assert f"rise by {span([many[n] - few[n] for n in others], 1)} microseconds" in page
    small = tuple({case for _, case in rows} - {*large})
    assert f"takes {span(times('limit', cases=small), 2)} of our time" in page

    groups, tensors = at("groups", 1000, "ours"), at("tensors", 1000, "ours")
    assert f"take {groups / 1e3:.2f} ms where one group of 1000 takes {tensors / 1e3:.2f}" in page
    assert f"to read, {(groups - tensors) / 1e3:.1f} microseconds" in page
    fused = [at(against, 1000, "fused") / 1e3 for against in ("groups", "tensors")]
    assert f"takes {fused[0]:.1f} ms instead of {fused[1]:.1f}" in page
    fixed = [at("tensors", 1, "ours"), at("elements", 1000, "ours")]
    best = [at("tensors", 1, "fused"), at("elements", 1000, "fused")]
    assert {f"{value:.0f}" for value in fixed} == {"11"}
    assert f"some 11 microseconds whatever the size (torch's best: {span(best, 0)})" in page
    cached = (at("elements", 10**6, "ours") - fixed[1]) / 1e3  # nanoseconds for each
    assert f"{cached:.2f} nanoseconds for each" in page
    for count in (10**7, 10**8):
        assert f"and {at('elements', count, 'ours') * 1e3 / count:.1f} once they come" in page
    for count in (300, 1000, 3000):
        assert at("tensors", count, "ours") / count == pytest.approx(tensors / 1000, rel=0.05)

    slow_copies, fast_copies = [], []
    for row in rows.values():
        for rate in row["copy_gb_per_s"]:
            (slow_copies if rate < 60 else fast_copies).append(rate)
    assert f"at {span(slow_copies, 0)} GB/s most of the time and at {span(fast_copies, 0)}" in page


def test_the_memory_that_documents_speak_of() -> None:
    case = Case(MODELS["gpt2-124m"], OPTIMIZERS["adamw"])
    names = [*contenders.TORCH, "ours", "limit"]  # as many as there are with DeepSpeed
    gigabytes = f"{race.bytes_needed(case, names) / 1e9:.0f} GB"
    for page in ("docs/performance.md", "benchmarks/README.md"):
        assert f"minutes, {gigabytes}" in (BENCHMARKS.parent / page).read_text("utf-8")
    assert max(m.elements for m in command.default_models("adamw", case.device)) == (
        case.model.elements
    )


def test_pipeline_measures_every_suite(tmp_path: Path) -> None:
    output = tmp_path / "pipeline.json"
    script = str(BENCHMARKS / "pipeline.py")
    done = run(script, "--quick", "--model", "1000x64", "--json", str(output))
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())["results"]
    assert [r["suite"] for r in results] == [
        *("clip", "ema", "accumulate", "state", "bfloat16 weights")
    ]
    for suite in results:
        first, *others = suite["contenders"].values()
        assert others
        assert first["time_relative_to_first"]["median"] == 1
        for row in (first, *others):
            assert row["ms"]["median"] > 0
            assert row["bytes_per_parameter"] > 0


def test_training_measures_every_suite(tmp_path: Path) -> None:
    output = tmp_path / "training.json"
    done = run(str(BENCHMARKS / "training.py"), "--quick", "--json", str(output))
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    suites = json.loads(output.read_text())["results"]
    assert len(suites) == 6
    for suite in suites:
        for row in suite["contenders"].values():
            assert row["us"]["median"] > 0
            assert row["time_relative_to_first"]["median"] > 0


def test_many_tensors_measures_every_count(tmp_path: Path) -> None:
    output = tmp_path / "many_tensors.json"
    done = run(str(BENCHMARKS / "many_tensors.py"), "--quick", "--json", str(output))
    assert done.returncode == 0, done.stderr
    counts = json.loads(output.read_text())["results"]
    assert [found["tensors"] for found in counts] == [100, 1000]
    for found in counts:
        assert f"\n{found['tensors']} tensors: " in done.stdout
        assert len(found["contenders"]) == 4
        for row in found["contenders"].values():
            assert row["ns"]["median"] > 0
            assert row["time_relative_to_ours"]["median"] > 0


def committed(kind: str) -> dict[str, dict[str, Any]]:
    """The contenders of each case in the results of benchmarks/pipeline.py or training.py."""
    (path,) = (BENCHMARKS / "results").glob(f"{kind}-cpu-*.json")
    results = json.loads(path.read_text())["results"]
    return {" ".join([r["suite"], r.get("case", "")]).strip(): r["contenders"] for r in results}


def page(name: str) -> str:
    return " ".join((BENCHMARKS.parent / "docs" / name).read_text("utf-8").split())


def test_what_the_page_of_the_pipeline_quotes() -> None:
    found = committed("pipeline")

    def times(case: str, name: str, *, as_long_as: str) -> float:
        ms = [found[case][who]["ms"]["median"] for who in (name, as_long_as)]
        return ms[0] / ms[1]

    def close(quoted: str, value: float) -> str:
        """What a ratio of medians comes to when it is quoted, as a median of ratios may be, too."""
        assert abs(float(quoted) - value) <= 0.03 * value, (quoted, value)
        return quoted

    def clipped(model: str) -> float:
        return times(f"clip {model}", "clip_grad_norm_ + fused", as_long_as="max_grad_norm")

    def accumulated(name: str) -> float:
        return times("accumulate gpt2-124m", name, as_long_as="accumulate()")

    sentences = [
        f"{close('1.28', times('ema 1x50M', 'ema_decay', as_long_as='no average'))} times as long "
        "as without on 50M elements, and with a pass of its own for it "
        f"{close('1.48', times('ema 1x50M', 'ours + a pass', as_long_as='no average'))};",
        f"take {close('1.31', clipped('1x50M'))} times as long as `max_grad_norm` on 50M elements, "
        f"{close('4.6', clipped('1000x4096'))} on 1000 tensors of 4096, "
        f"{close('25', clipped('1000x64'))} on 1000 of 64;",
        f"bfloat16 takes {close('0.75', times('state 1x50M', 'bfloat16', as_long_as='float32'))} "
        "times as long as in float32 on 50M elements",
        f"8 bits {close('0.71', times('state 1x50M', '8 bits', as_long_as='float32'))} and "
        f"{close('1.11', times('state 1000x4096', '8 bits', as_long_as='float32'))},",
        f"take {close('1.08', accumulated('bfloat16 += and fused'))} times as long as with "
        "`accumulate()`, and added up in float32 by torch "
        f"{close('3.4', accumulated('float32 += and fused'))} times.",
    ]
    for sentence in sentences:
        assert sentence in page("pipeline.md")


def test_what_the_page_says_of_many_tensors() -> None:
    (path,) = (BENCHMARKS / "results").glob("many-tensors-cpu-*.json")
    found = {r["tensors"]: r["contenders"] for r in json.loads(path.read_text())["results"]}
    ours = [found[n]["fusedopt"]["ns"]["median"] / 1e3 for n in (100, 1000, 10_000)]

    def times(name: str) -> list[float]:
        return [c[name]["time_relative_to_ours"]["median"] for c in found.values()]

    fused, asking = times("torch fused"), times("asking torch")
    for sentence in (
        f"takes {ours[0]:.1f} microseconds where there are 100, {ours[1]:.1f} where there are "
        f"1000 and {ours[2]:.1f} where there are 10,000;",
        f"takes {fused[0]:.0f}, {fused[1]:.0f} and {fused[2]:.0f} times as long.",
        f"{min(asking):.2f} to {max(asking):.2f} of our time is what torch takes",
    ):
        assert sentence in page("performance.md")


def test_what_the_pages_of_training_quote() -> None:
    found = committed("training")

    def us(case: str, name: str) -> float:
        return found[case][name]["us"]["median"]

    schedule = "schedule, two groups"
    ours, cosine, lambda_lr = (us(schedule, name) for name in found[schedule])
    for sentence in (
        f"takes {ours:.1f} microseconds in the run",
        f"same curve {lambda_lr:.1f}, with its `CosineAnnealingLR` {cosine:.1f}.",
    ):
        assert sentence in page("training/schedules.md")
    large = "best weights, 12.6 million parameters in 96 tensors"
    small = "best weights, 66 thousand in 800"
    for sentence in (
        f"on the CPU | {us('stopping', 'step() of a tensor'):.1f} µs |",
        f"| {us(large, 'save()') / 1e3:.1f} ms; one `torch._foreach_copy_` of the same bytes takes "
        f"{us(large, '_foreach_copy_ of the same') / us(large, 'save()'):.1f} times as long, "
        "`copy.deepcopy` of the state dicts "
        f"{us(large, 'deepcopy of the state dicts') / us(large, 'save()'):.1f} times",
        f"| `restore()` of the same | {us(large, 'restore()') / 1e3:.0f} ms |",
        f"and their state | {us(small, 'save()') / 1e3:.0f} ms:",
        f"| `restore()` of the same | {us(small, 'restore()') / 1e3:.0f} ms,",
    ):
        assert sentence in page("training/stopping.md")


def load_gpu_report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_report", BENCHMARKS / "gpu_report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_gpu_report_asks_for_what_there_is(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    command.add_command(commands)
    parity_command.add_command(commands)
    for part, (line, seconds) in load_gpu_report().parts(tmp_path).items():
        assert seconds > 0
        if "fusedopt" in line:
            assert "cuda" in line
            here = ["cpu" if word == "cuda" else word for word in line]
            options = parser.parse_args(here[here.index("fusedopt") + 1 :])
            assert options.json == tmp_path / f"{part}.json"
            for model in getattr(options, "model", None) or ():
                find(model)
        for argument in line:
            if argument.endswith(".py"):
                assert (BENCHMARKS.parent / argument).exists()


def test_a_gpu_report_is_a_few_files(tmp_path: Path) -> None:
    """Of each set of parts, also where someone can fetch eight files and no more."""
    module = load_gpu_report()
    known = module.parts(tmp_path)
    for parts in module.SETS.values():
        words = [word for part in parts for word in known[part][0]]
        assert len(parts) == len({word for word in parts} & known.keys())
        assert len([word for word in words if word.startswith(str(tmp_path))]) + 2 <= 8


def test_the_sanitizer_runs_tests_that_there_are() -> None:
    wanted = load_gpu_report().SANITIZED
    options = ("--collect-only", "-o", "addopts=", "-p", "no:cacheprovider")
    paths = [str(BENCHMARKS.parent / test) for test in wanted]
    listed = run("-m", "pytest", *options, "-q", *paths).stdout.splitlines()
    assert listed[: len(wanted)] == wanted


def test_an_extension_is_in_place_when_it_is_of_these_sources(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = load_gpu_report()
    folder = Path(fusedopt.__file__).parent
    arch, digest = kernels.cuda_architectures().split(",")[0], kernels.SOURCES
    assert digest == module.sources()
    assert module.in_place(arch, digest)
    assert not module.in_place("33", digest, folder)
    assert not module.in_place(arch, "another", folder)
    assert not module.in_place(arch, digest, tmp_path)
    before = module.sources()
    for name in ("setup.py", "csrc/rules.h"):
        copied = tmp_path / name.replace("/", "-")
        shutil.copytree(folder.parent / "csrc", copied / "csrc")
        shutil.copy(folder.parent / "setup.py", copied)
        monkeypatch.setattr(module, "ROOT", copied)
        assert module.sources() == before
        with (copied / name).open("a") as file:
            file.write("\n")
        assert module.sources() != before


def test_which_gpu_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = load_gpu_report()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module.first_gpu() == {}
    with pytest.raises(SystemExit, match="no GPU here"):
        module.main(["smoke"])
    for answer, found in {
        "9.0, 580.1.2, GPU, of some kind\n8.0, 1, B": ("90", "580.1.2", "GPU, of some kind"),
        "NVIDIA-SMI has failed": None,
    }.items():
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{answer}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        names = ("arch", "driver", "gpu")
        assert module.first_gpu() == (dict(zip(names, found, strict=True)) if found else {})


def test_a_gpu_report_needs_a_python_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before anything is built, and what is installed even where there is no GPU."""
    module = load_gpu_report()
    assert module.lacking() == ""
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name == "torch" or None)
    with pytest.raises(SystemExit, match=r"has no pybind11, ninja, setuptools, pytest\.$"):
        module.main(["smoke"])
    monkeypatch.setattr(module, "lacking", lambda: "")
    monkeypatch.setattr(module, "first_gpu", lambda: {"arch": "90", "driver": "1", "gpu": "A GPU"})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit, match=r"torch \S+ of .* can use no GPU\.$"):
        module.main(["smoke"])


def gpu_report(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    known: dict[str, tuple[list[str], int]],
    *names: str,
    built: bool = False,
) -> tuple[int, dict[str, Any]]:
    """What a report of these parts exits with, and how they ended."""
    module = load_gpu_report()
    monkeypatch.setattr(module, "first_gpu", lambda: {"arch": "90", "driver": "1", "gpu": "A GPU"})
    monkeypatch.setattr(module, "blind", lambda: "")
    monkeypatch.setattr(module, "in_place", lambda *_: built)
    monkeypatch.setattr(module, "parts", lambda _: known)
    monkeypatch.setattr(module, "GRACE", 1)
    monkeypatch.setenv("GPU_REPORT_DIR", str(folder))
    with pytest.raises(SystemExit) as stopped:
        module.main(list(names))
    report = json.loads((folder / "report.json").read_text())
    assert (
        report["of"].items() >= {"driver": "1", "gpu": "A GPU", "torch": torch.__version__}.items()
    )
    assert report["of"].keys() >= {"date", "commit", "sources"}
    return stopped.value.code, report["parts"]


def python(code: str, seconds: int = 20) -> tuple[list[str], int]:
    return [sys.executable, "-c", code], seconds


def test_a_gpu_report_goes_on_after_failures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "folder"
    known = {
        "build": python("import os; print(os.environ['FUSEDOPT_CUDA_ARCHS'])"),
        "fails": python("print('why'); raise SystemExit(3)"),
        "missing": (["no-such-program"], 20),
        "slow": python("import time; print('begun', flush=True); time.sleep(60)", 1),
        "bars": python(
            f"open({str(folder / 'bars.json')!r}, 'w').write('{{\"table\": [\"777\"]}}')"
        ),
    }
    code, ended = gpu_report(monkeypatch, folder, known, *known)
    assert code
    assert {name: (part["ended"], part["last line"]) for name, part in ended.items()} == {
        "build": ("passed", "90"),
        "fails": ("failed (3)", "why"),
        "missing": (ended["missing"]["ended"], ""),
        "slow": ("stopped after 1 s", ended["slow"]["last line"]),
        "bars": ("passed", ""),
    }
    assert "no-such-program" in ended["missing"]["ended"]
    assert "begun" in ended["slow"]["output"]
    log = (folder / "log.txt").read_text()
    assert "why" in log
    assert "begun" in log
    out = capsys.readouterr().out
    assert out.index("==== fails\nwhy") < out.index("\n777\n") < out.rindex("stopped after 1 s")


def test_a_gpu_report_of_some_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = {name: python("print(1)") for name in ("gpu", "build", "one", "two", "three")}
    code, ended = gpu_report(monkeypatch, tmp_path, known, "two", "one", "two")
    assert not code
    assert list(ended) == ["gpu", "build", "two", "one"]
    known["build"] = python("raise SystemExit(1)")
    code, ended = gpu_report(monkeypatch, tmp_path, known, "two")
    assert code
    assert ended["two"]["ended"] == "not run: no build"
    code, ended = gpu_report(monkeypatch, tmp_path, known, "two", built=True)
    assert not code
    assert ended["build"]["last line"].startswith("in place")
    monkeypatch.setenv("GPU_REPORT_SECONDS", "0")
    code, ended = gpu_report(monkeypatch, tmp_path, known, "two")
    assert ended["two"]["ended"] == "no time was left"
    module = load_gpu_report()
    with pytest.raises(
        SystemExit, match="no part 'four'; there are first, second, gpu, build, one"
    ):
        module.chosen(["four"], known)
    assert module.chosen([], module.parts(tmp_path)) == ["gpu", "build", *module.SETS["first"]]


# --- The scripts of the report, on an emulated GPU ----------------------------------------------


def part_of_report(name: str, folder: Path, *more: str) -> str:
    """What the report's own command prints, with these arguments after it."""
    (_, script, *words), _ = load_gpu_report().parts(folder)[name]
    words = [word for word in words if word not in ("--device", "cuda")]
    root = BENCHMARKS.parent
    done = run(str(root / script), *words, "--device", "fake", *more, path=str(root))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_smoke_finds_all_right(tmp_path: Path) -> None:
    kept = "bfloat16 with remainder, state in 8 bits"
    printed = part_of_report("smoke", tmp_path, "--tensors", "5", "--format", kept)
    assert f"{kept}: 10 combinations are right" in printed


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_smoke_finds_what_is_wrong(
    script: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Here the CPU is in the place of the GPU."""
    smoke = script("smoke")
    shapes = smoke.Shapes(((5, 3), (2000,), (7,)))

    def check(name: str, rule: str = "AdamW", clip: bool = False, **more: Any) -> int:
        return smoke.check(name, rule, more, clip, shapes, CPU)

    def skips_one(model: Any, optimizer: torch.optim.Optimizer) -> None:
        smoke.eager(model, optimizer)
        with torch.no_grad():
            model.params[1][1999] += 1e-3

    monkeypatch.setattr(smoke, "on_a_side_stream", smoke.eager)
    monkeypatch.setattr(smoke, "replayed", smoke.eager)
    for name in smoke.FORMATS:
        assert check(name, clip=True, ema_decay=0.5) == 0
    for rule in smoke.RULES:
        assert check("bfloat16 with remainder", rule, clip=True) == 0
    monkeypatch.setattr(smoke, "replayed", skips_one)
    where = r"replayed: weight: 1 of 2022 elements are wrong; the first is element 1999 of param"
    with pytest.raises(smoke.MismatchError, match=where):
        check("float32")
    monkeypatch.setattr(smoke, "replayed", smoke.eager)
    monkeypatch.setattr(smoke, "torchs", lambda *_: torch.zeros(2022))
    with pytest.raises(smoke.MismatchError, match="AdamW, float32, clipped, against torch: weight"):
        check("float32", clip=True)
    monkeypatch.setattr(smoke, "check_roots", lambda *_: 0)
    whole_check = smoke.check
    monkeypatch.setattr(smoke, "check", lambda *of: whole_check(*of[:-2], shapes, CPU))
    with pytest.raises(SystemExit, match="smoke: MISMATCH: AdamW, float32, against torch"):
        smoke.main([])
    assert "combinations are right" not in capsys.readouterr().out


def test_smoke_looks_at_roots(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    smoke = script("smoke")
    assert smoke.check_roots(CPU, 1009) == 16628
    usual = fusedopt.Adagrad
    monkeypatch.setattr(
        smoke.fusedopt, "Adagrad", lambda params, lr, eps: usual(params, lr=lr, eps=1e-6)
    )
    with pytest.raises(smoke.MismatchError, match=r"square roots: \d+ of 16628 elements are wrong"):
        smoke.check_roots(CPU, 1009)


def test_what_smoke_takes_for_the_same(script: Callable[[str], ModuleType]) -> None:
    smoke = script("smoke")
    shapes = smoke.Shapes(((5000,), (3,)))
    usual = torch.ones(5003)

    def differ(changed: dict[int, float], tight: Any, coarse: Any, dtype: Any = None) -> int:
        values = usual.clone()
        for at, value in changed.items():
            values[at] = value
        found, expected = values.to(dtype or usual.dtype), usual.to(dtype or usual.dtype)
        return smoke.compare("it", shapes, found, expected, tight, coarse)

    few, many = ({i: 1.01 for i in range(n)} for n in (5, 6))
    assert differ({5001: 1 + 1e-6}, smoke.TIGHT, None) == 1
    assert differ(few, smoke.TIGHT, (0.1, 0.1)) == 5
    assert differ({i: 2 for i in range(5)}, smoke.TIGHT, (0.1, 0.1), torch.uint8) == 5
    for arguments in (
        ({5001: 1 + 1e-6}, None, None),
        ({5001: 1.01}, smoke.TIGHT, None),
        ({5001: math.nan}, smoke.TIGHT, (0.1, 0.1)),
        ({5001: 1.3}, smoke.TIGHT, (0.1, 0.1)),
        (many, smoke.TIGHT, (0.1, 0.1)),
        ({0: 2}, smoke.TIGHT, None, torch.uint8),
    ):
        with pytest.raises(smoke.MismatchError, match=r"it: \d of 5003 elements are wrong"):
            differ(*arguments)
    with pytest.raises(smoke.MismatchError, match="element 1 of parameter 1, \\[3\\]: nan, not 1"):
        differ({5001: math.nan}, None, None)
    zeros = torch.zeros(1), -torch.zeros(1)
    with pytest.raises(smoke.MismatchError, match=r"number 0: 0\.0, not -0\.0"):
        smoke.compare("it", shapes, *zeros, None, None)
    with pytest.raises(smoke.MismatchError, match="float64, not"):
        smoke.compare("it", shapes, usual.double(), usual, smoke.TIGHT, None)


def test_bars_are_measured_and_told(tmp_path: Path) -> None:
    races = ("1000 tensors", "float32, state in 8 bits", "float32, clipped")
    printed = part_of_report("bars", tmp_path, "--race", *races)
    found = json.loads((tmp_path / "bars.json").read_text())
    assert found["table"] == printed.splitlines()[-len(found["table"]) :]
    assert [bar["race"] for bar in found["bars"]] == [
        *(races[0], races[0]), *(races[1], races[1]), races[2],
    ]  # fmt: skip
    for row in found["results"]:
        for name, times in row["contenders"].items():
            assert times["device_ms"]["median"] > 0, name
            assert times["whole_ms"]["median"] > 0, name
            assert times["host_ms"] > 0, name
    assert "ours, replayed" in found["results"][0]["contenders"]
    assert found.keys() >= {"date", "commit", "versions"}


def test_bars_are_passed_or_short(
    script: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    bars = script("bars")

    def times(device: float, whole: float) -> Any:
        return bars.Times(*(measure.Timing({0: t, 1: t}, 2) for t in (device, whole)), 1.0)

    measured = {"ours": times(1.0, 8.0), "torch fused": times(4.0, 8.0), "copy": times(0.9, 3.0)}

    def told(*bar: Any) -> tuple[str, float]:
        judged = bars.judge("race", bars.Bar("it", *bar), measured)
        assert bars.line(judged).split()[0] == judged["verdict"] or not judged["verdict"]
        return judged["verdict"], judged["value"]["median"]

    assert told("copy", "device", 0.9) == ("pass", 0.9)
    assert told("copy", "device", 0.91) == ("short", 0.9)
    assert told("torch fused", "whole", 1.5) == ("short", 1.0)
    assert told("torch fused", "device") == ("", 4.0)
    assert told("torch fused", "device", 4.5, "copy") == ("short", pytest.approx(4 / 0.9))

    def measured_or_not(race: Any, *_: Any) -> Any:
        if race.graph:
            raise torch.OutOfMemoryError("no memory\nat all")
        return measured

    monkeypatch.setattr(bars, "measure", measured_or_not)
    monkeypatch.setattr(bars.machine, "environment", lambda _: {"commit": None})
    monkeypatch.setattr(bars.machine, "describe", lambda _: "a machine")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setenv("GPU_REPORT_COMMIT", "of today")
    path = tmp_path / "bars.json"
    with pytest.raises(SystemExit):
        bars.main(["--json", str(path), "--race", "1000 tensors", "float32"])
    found = json.loads(path.read_text())
    assert found["commit"] == "of today"
    assert found["table"][0] == "FAILED 1000 tensors: OutOfMemoryError: no memory"
    assert found["table"][1].split()[:2] == ["short", "float32"]
    assert capsys.readouterr().out.endswith("\n".join(found["table"]) + "\n")
    with pytest.raises(SystemExit):
        bars.main(["--json", str(path), "--seconds", "-1"])
    assert len(json.loads(path.read_text())["table"]) == len(bars.RACES)


# As Nsight Compute writes it with --csv --page raw: names, units, a line for each kernel.
PROFILED = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Grid Size","gpu__time_duration.sum","launch__registers_per_thread"
"","","","","ns","register/thread"
"0","7","void fusedopt::cuda::norm<float>(fusedopt::Table)","(9, 1, 1)","1,234.5","80"
"1","7","void fusedopt::(anonymous namespace)::update<(fusedopt::Rule)3, float>(Table)","","2","96"
"""


def test_what_the_profiler_says(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """The steps are taken on the emulated GPU, under a program that says what a profiler would."""
    ncu, sample = tmp_path / "ncu", tmp_path / "sample"
    sample.write_text(PROFILED)
    ncu.write_text(
        f"#!{sys.executable}\n"
        "import shutil, subprocess, sys\n"
        "words = sys.argv\n"
        f"shutil.copy({str(sample)!r}, words[words.index('--log-file') + 1])\n"
        "steps = words[words.index(sys.executable):] + ['--model', '3x100']\n"
        "sys.exit(subprocess.run(steps).returncode)\n"
    )
    ncu.chmod(0o755)
    printed = part_of_report("ncu", tmp_path, "--ncu", str(ncu), "--kind", "float32", "bfloat16")
    assert printed.splitlines()[:2] == ["float32", "bfloat16"]
    with (tmp_path / "kernels.csv").open() as file:
        rows = {row[0]: row[1:] for row in csv.reader(file)}
    assert rows["steps"] == ["float32; bfloat16"]
    assert rows.keys() >= {"date", "commit", "gpu", "driver", "torch"}
    assert rows["kernel"] == ["", "norm<float>", "update<(Rule)3, float>"]
    assert rows["gpu__time_duration.sum"] == ["ns", "1,234.5", "2"]
    assert "launch__registers_per_thread" in printed
    with pytest.raises(ValueError, match="of no kernel"):
        script("kernels").turned("==PROF== No kernels were profiled.\n")


def test_a_gpus_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flow of it, with stand-ins for what asks a GPU."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            pass

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return 0.25

    @contextmanager
    def profile(activities: list[Any]) -> Iterator[SimpleNamespace]:
        assert activities == [torch.profiler.ProfilerActivity.CUDA]
        kinds = [("CUDA", False), ("CUDA", True), ("CPU", False), ("CUDA", False)]
        events = [
            SimpleNamespace(device_type=SimpleNamespace(name=name), is_user_annotation=annotation)
            for name, annotation in kinds
        ]
        yield SimpleNamespace(events=lambda: events)

    monkeypatch.setattr(torch.profiler, "profile", profile)
    waits, steps = [], []
    stand_ins = {
        "Event": Event,
        "_sleep": waits.append,
        "synchronize": lambda *_: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 164,
        "get_device_name": lambda _: "a GPU",
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    assert machine.device_ms(lambda: steps.append(1), host=0.05) == 0.25
    assert waits == 5 * [int(0.1 * machine.CYCLES_PER_S)]
    assert machine.extra_bytes(lambda: steps.append(1)) == 64
    assert machine.launches(lambda: steps.append(1)) == 2
    assert len(steps) == 7
    found = machine.environment(torch.device("cuda", 0))
    assert found["launch_us"]["device"] == 250
    assert "a launch takes " in machine.describe(found)
    assert "us of the host and 250.0 of the GPU" in machine.describe(found)


def test_models_that_do_not_fit_may_be_left_out(monkeypatch: pytest.MonkeyPatch, bench) -> None:
    monkeypatch.setattr(command, "free_bytes", lambda device: 20_000_000)
    printed = bench(
        *("--fit", "--quick", "--model", "1x50M", "100x64", "--optimizer", "sgd"),
        *("--contender", "ours"),
    )
    assert "left out: 1x50M with sgd needs" in printed
    assert "\n100x64 (" in printed
