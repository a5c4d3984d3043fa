"""How fast a GPU's steps are, against what they are meant to be: ``python benchmarks/bars.py``.

Ours, torch's fused step and a copy of as many bytes take turns on models that are either one large
tensor or many small ones. Each has three times: the device's, for a step that it need not wait
for; the whole, until the device is done; and the host's, until the call returns. Bars are what the
project has set itself; each is printed as passed or short, with its number. Ratios are taken round
by round.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import emulated  # noqa: F401
import torch
from pipeline import replayed

import fusedopt
from fusedopt.bench import machine
from fusedopt.bench.contenders import CONTENDERS, MAX_NORM, OPTIMIZERS, Case, Gradients, copy
from fusedopt.bench.measure import MIN_ROUNDS, Timing, ratio, rounds
from fusedopt.models import Model, find

Step = Callable[[], object]
ADAMW = OPTIMIZERS["adamw"]
FLOAT32, BF16, UINT8 = torch.float32, torch.bfloat16, torch.uint8
ROUNDS = 12
OURS, FUSED, COPY, REPLAYED = "ours", "torch fused", "copy", "ours, replayed"
COPYS_SHARE = 0.92  # of a copy's speed that is near enough to it


@dataclass(frozen=True)
class Bar:
    """What a ratio of two times should be at least.

    Attributes:
        what: It says, in words.
        other: Whose time is divided by that of ``mine``.
        kind: Which of the times: "device" or "whole".
        least: The ratio; None: it is told, but nothing is asked of it.
        mine: Usually ours.
    """

    what: str
    other: str
    kind: str
    least: float | None = None
    mine: str = OURS


@dataclass(frozen=True)
class Race:
    """A model, how it is kept, and what is asked of its step.

    Attributes:
        model: Its name on a GPU, and a smaller one's on the emulated GPU.
        moved: Bytes per element that our step has to move.
        bars: What is asked.
        dtype: Of parameters and gradients.
        options: Of our optimizer.
        clip: Whether all clip the gradients' norm.
        graph: Whether a replayed graph of ours takes part.
    """

    model: tuple[str, str]
    moved: int
    bars: tuple[Bar, ...]
    dtype: torch.dtype = FLOAT32
    options: dict[str, Any] = field(default_factory=dict)
    clip: bool = False
    graph: bool = False


def of_a_copy(least: float | None = None) -> Bar:
    return Bar("of a copy's speed", COPY, "device", least)


LARGE = ("1x1B", "1x4k")
RACES = {
    "float32": Race(LARGE, 28, (of_a_copy(COPYS_SHARE), Bar("times torch", FUSED, "device"))),
    "bfloat16, remainder": Race(
        LARGE, 26, (of_a_copy(COPYS_SHARE),), BF16, {"weight_precision": "remainder"}
    ),
    "float32, state in 8 bits": Race(
        LARGE,
        16,
        (Bar("times torch in float32", FUSED, "device", 1.0), of_a_copy()),
        options={"state_dtype": UINT8},
    ),
    "float32, clipped": Race(LARGE, 32, (of_a_copy(COPYS_SHARE),), clip=True),
    "1000 tensors": Race(
        ("1000x1024", "10x64"),
        28,
        (
            Bar("replayed, times step()", OURS, "device", 1.0, mine=REPLAYED),
            Bar("times torch", FUSED, "whole"),
        ),
        graph=True,
    ),
    "10000 tensors": Race(
        ("10000x64", "20x64"), 28, (Bar("times torch", FUSED, "whole", 10.0),)
    ),
    "bfloat16": Race(LARGE, 14, (of_a_copy(), Bar("times torch", FUSED, "device")), BF16),
    "465 groups": Race(
        ("465x70k-groups", "5x300-groups"), 28, (Bar("times torch", FUSED, "whole"),)
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Times:
    """Of one contender: seconds per step."""

    device: Timing
    whole: Timing
    host: float


def contenders(race: Race, model: Model, gradients: Gradients, case: Case) -> dict[str, Step]:
    """What takes part, by name; each call is one step."""
    options = {
        **ADAMW.options,
        **race.options,
        **({"max_grad_norm": MAX_NORM} if race.clip else {}),
    }
    found: dict[str, Step] = {
        OURS: fusedopt.AdamW(gradients.parameters(), **options).step,
        FUSED: CONTENDERS["fused"](case, gradients),
        COPY: copy(race.moved * model.elements, case.device),
    }
    if race.graph:  # of gradients of its own, which stay where they are
        found[REPLAYED] = replayed(fusedopt.AdamW(Gradients(case).parameters(), **options))
    return found


def device_rounds(
    steps: dict[str, Step], hosts: dict[str, float], budget: float
) -> dict[str, Timing]:
    """Times of the device, in alternating rounds, as many as the budget in seconds allows."""
    times: dict[str, dict[Any, float]] = {name: {} for name in steps}
    names = list(steps)
    start, turn = time.monotonic(), 0
    while turn < MIN_ROUNDS or (turn < ROUNDS and time.monotonic() - start < budget):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name][turn] = machine.device_ms(steps[name], hosts[name]) / 1e3
        turn += 1
    return {name: Timing(each, len(each)) for name, each in times.items()}


def measure(race: Race, device: torch.device, budget: float) -> dict[str, Times]:
    """All times of a race, in roughly so many seconds."""
    model = find(race.model[device.type == "fake"])
    case = Case(model, ADAMW, device, race.dtype, race.clip)
    gradients = Gradients(case)
    steps = contenders(race, model, gradients, case)
    now = machine.clock(device)
    for step in steps.values():
        step()  # makes the state
        step()
    hosts = {
        name: machine.host_seconds(step, gradients.move, now, budget / 20)
        for name, step in steps.items()
    }
    on_device = device_rounds(steps, hosts, budget / 3)
    whole = rounds(steps, count=ROUNDS, budget=budget / 3, clock=now)
    return {name: Times(on_device[name], whole[name], hosts[name]) for name in steps}


def judge(name: str, bar: Bar, times: dict[str, Times]) -> dict[str, Any]:
    """A bar, and how high the step came."""
    other, mine = (getattr(times[who], bar.kind) for who in (bar.other, bar.mine))
    value = ratio(other, mine)
    verdict = "" if bar.least is None else "pass" if value.median >= bar.least else "short"
    return {"race": name, **asdict(bar), "value": asdict(value), "verdict": verdict}


def line(bar: dict[str, Any]) -> str:
    """A bar in a table."""
    asked = "" if bar["least"] is None else f"at least {bar['least']:g}"
    value = bar["value"]
    spread = f"{value['median']:.3f} [{value['low']:.3f}-{value['high']:.3f}]"
    what = f"{bar['what']} ({bar['kind']})"
    return f"{bar['verdict']:<6}{bar['race']:<26}{what:<36}{spread:<24}{asked}".rstrip()


def figures(race: Race, elements: int, times: dict[str, Times]) -> dict[str, Any]:
    """What JSON files hold of a race."""
    return {
        name: {
            "device_ms": {key: 1e3 * value for key, value in asdict(each.device.spread).items()},
            "whole_ms": {key: 1e3 * value for key, value in asdict(each.whole.spread).items()},
            "host_ms": 1e3 * each.host,
            **(
                {}
                if name == FUSED  # which may move other bytes
                else {"gb_per_s": race.moved * elements / each.device.spread.median / 1e9}
            ),
        }
        for name, each in times.items()
    }


def tell(name: str, elements: int, found: dict[str, Any]) -> None:
    print(f"\n{name}: {elements:,} elements; milliseconds of the device, whole, of the host")
    for who, each in found.items():
        device, whole = each["device_ms"], each["whole_ms"]["median"]
        rate = f"{each['gb_per_s']:>9.0f} GB/s" if "gb_per_s" in each else ""
        spread = f"{device['median']:.4f} [{device['low']:.4f}-{device['high']:.4f}]"
        print(f"  {who:<16}{spread:<28}{whole:>9.4f}{each['host_ms']:>9.4f}{rate}", flush=True)


def write(report: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "fake"), default="cuda")
    parser.add_argument("--race", nargs="+", choices=RACES, default=list(RACES))
    parser.add_argument("--seconds", type=float, default=60, help="for all of it (default: 60)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    device = torch.device(options.device, 0)
    report: dict[str, Any] = {**machine.environment(device), "results": [], "bars": [], "table": []}
    report["commit"] = os.environ.get("GPU_REPORT_COMMIT") or report["commit"]
    print(machine.describe(report))
    failed = False
    for index, name in enumerate(options.race):
        race = RACES[name]
        left = end - time.monotonic()
        try:
            if left < 0:
                raise TimeoutError("no time was left")
            times = measure(race, device, left / (len(options.race) - index))
        except Exception as error:
            failed = True
            first = str(error).partition("\n")[0]
            report["table"].append(f"FAILED {name}: {type(error).__name__}: {first}")
        else:
            elements = find(race.model[device.type == "fake"]).elements
            found = figures(race, elements, times)
            tell(name, elements, found)
            bars = [judge(name, bar, times) for bar in race.bars]
            report["results"].append({"race": name, "elements": elements, "contenders": found})
            report["bars"] += bars
            report["table"] += map(line, bars)
            del times
        gc.collect()
        torch.cuda.empty_cache()
        write(report, options.json)
    print("", *report["table"], sep="\n")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
