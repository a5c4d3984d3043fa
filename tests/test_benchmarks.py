"""Smoke tests of the benchmarks. None of them looks at a time."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load_measure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_measure", BENCHMARKS / "measure.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


measure = load_measure()


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
    turns = milliseconds(700, 10, 20, 700, 30, 30, 700, 20, 40)
    timing = measure.rounds(
        {"a": machine.step("a", preparation + turns)}, count=3, clock=machine.clock
    )["a"]
    assert timing == measure.Timing(tuple(milliseconds(15, 30, 30)), steps=2)
    assert timing.spread.median == Fraction(30, 1000)
    assert timing.spread.low == Fraction(18, 1000)  # a fifth of the way from the first to the next
    assert timing.spread.high == Fraction(30, 1000)


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
    assert measure.rounds({"a": contender}, clock=machine.clock)["a"].steps == steps


def test_slow_contenders_take_part_in_fewer_rounds() -> None:
    machine = FakeMachine()
    steps = {
        "fast": machine.step("fast", milliseconds(30)),
        "slow": machine.step("slow", milliseconds(500)),  # two steps a turn: 5 s last for 5 turns
        "slowest": machine.step("slowest", milliseconds(60_000)),
    }
    timings = measure.rounds(steps, count=12, budget=15, clock=machine.clock)
    assert {name: len(timing.rounds) for name, timing in timings.items()} == {
        "fast": 12,
        "slow": 5,
        "slowest": measure.MIN_ROUNDS,
    }


def test_ratio_is_taken_round_by_round() -> None:
    # The machine becomes ten times slower, the ratio stays.
    a = measure.Timing((2.0, 4.0, 20.0, 40.0), steps=1)
    b = measure.Timing((1.0, 2.0, 10.0), steps=5)
    assert measure.ratio(a, b) == measure.Spread(2.0, 2.0, 2.0)
    assert measure.ratio(b, a) == measure.Spread(0.5, 0.5, 0.5)


def run_bench(*arguments: str, script: str = "bench.py") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        # One thread has no barriers to wait at, however busy the machine is with other tests.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_bench_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = run_bench(
        "--quick", "--case", "1000x64", "--optimizer", "rmsprop", "sgd", "--json", str(out)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n1000x64 ") == 2
    assert "fused is absent: torch.optim.RMSprop has no fused=True" in done.stdout

    report = json.loads(out.read_text())
    assert {"date", "commit", "cpu", "isa", "load_average"} <= report.keys()
    assert report["threads"] == 1
    assert {"fusedopt", "torch", "python"} <= report["versions"].keys()
    rmsprop, sgd = report["results"]
    assert (rmsprop["optimizer"], sgd["optimizer"]) == ("rmsprop", "sgd")
    assert sgd["bytes_per_step"] == 20 * 64_000
    assert sgd["contenders"].keys() == {"for-loop", "foreach", "fused", "ours", "limit"}
    assert sgd["absent"].keys() == {"DeepSpeed"}
    assert rmsprop["absent"].keys() == {"DeepSpeed", "fused"}
    for contender in sgd["contenders"].values():
        assert contender["rounds"] >= measure.MIN_ROUNDS
        assert contender["gb_per_s"] > 0
        assert contender["ms"].keys() == {"median", "low", "high"}
    assert sgd["time_relative_to_ours"].keys() == {
        "torch's best", "for-loop", "foreach", "fused", "limit"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("option", "known"), [("--case", "resnet50-like"), ("--optimizer", "rmsprop")]
)
def test_unknown_names_are_refused(option: str, known: str) -> None:
    done = run_bench(option, "nonsense")
    assert done.returncode == 2
    assert "nonsense" in done.stderr
    assert known in done.stderr.partition("choose from")[2]


def test_pipeline_measures_every_suite(tmp_path: Path) -> None:
    output = tmp_path / "pipeline.json"
    arguments = ("--quick", "--case", "1000x64", "--json", str(output))
    done = run_bench(*arguments, script="pipeline.py")
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


def test_cases_are_the_models_they_are_named_after() -> None:
    code = "\n".join(
        [
            "from cases import CASES",
            "for name in 'gpt2-124m', 'resnet50-like', '1x50M':",
            "    print(len(CASES[name].shapes), CASES[name].elements)",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:3] == ["148 124439808", "161 25557032", "1 50000000"]
