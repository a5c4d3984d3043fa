"""The same cases and contenders under pytest-benchmark, for its histograms and comparisons.

Run by ``pytest benchmarks --benchmark-enable --benchmark-only``; asserts nothing about times. Its
contenders run one after the other, so its ratios drift with the machine: quote ``fusedopt bench``.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fusedopt.bench.command import DEFAULT_OPTIMIZERS, default_models
from fusedopt.bench.contenders import (
    CONTENDERS,
    CPU,
    DEFAULT_CONTENDERS,
    OPTIMIZERS,
    AbsentError,
    Case,
    Gradients,
)

CASES = {
    f"{optimizer} {model.name}": Case(model, OPTIMIZERS[optimizer])
    for optimizer in DEFAULT_OPTIMIZERS
    for model in default_models(optimizer, CPU)
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def gradients(case: Case) -> Iterator[Gradients]:
    """The gradients of a case."""
    yield Gradients(case)
    gc.collect()  # optimizers are in reference cycles, and hold gigabytes


@pytest.mark.parametrize("contender", DEFAULT_CONTENDERS)
def test_step(
    benchmark: BenchmarkFixture, case: Case, contender: str, gradients: Gradients
) -> None:
    try:
        step = CONTENDERS[contender](case, gradients)
    except AbsentError as error:
        pytest.skip(str(error))
    benchmark.group = f"{case.optimizer.name} {case.model.name}"
    benchmark.extra_info["bytes_per_step"] = case.bytes_per_step
    benchmark.pedantic(step, rounds=10, warmup_rounds=2)
