"""The same cases and contenders under pytest-benchmark, for its histograms and comparisons.

Run by ``pytest benchmarks --benchmark-enable --benchmark-only``; asserts nothing about times. Its
contenders run one after the other, so its ratios drift with the machine: quote bench.py's.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.cases import CASES, CONTENDERS, DEFAULT_GRID, OPTIMIZERS, AbsentError, gradients


@pytest.fixture(scope="module")
def grads(case: str) -> Iterator[list[Tensor]]:
    """The gradients of one case, which all its contenders share."""
    yield gradients(CASES[case])
    gc.collect()  # optimizers are in reference cycles, and hold gigabytes


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize(
    ("optimizer", "case"),
    [(optimizer, case) for optimizer, cases in DEFAULT_GRID.items() for case in cases],
    scope="module",
)
def test_step(
    benchmark: BenchmarkFixture, optimizer: str, case: str, contender: str, grads: list[Tensor]
) -> None:
    try:
        step = CONTENDERS[contender](CASES[case], OPTIMIZERS[optimizer], grads)
    except AbsentError as error:
        pytest.skip(str(error))
    benchmark.group = f"{optimizer} {case}"
    benchmark.extra_info["bytes_per_step"] = OPTIMIZERS[optimizer].bytes_per_step(CASES[case])
    benchmark.pedantic(step, rounds=10, warmup_rounds=2)
