"""The demo runs, draws, and says in one sentence what it lacks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

DEMO = Path(__file__).parents[1] / "examples" / "digits.py"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    # One thread: on a busy machine, small matrices wait for threads longer than they compute.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=120
    )


def assert_one_sentence(result: subprocess.CompletedProcess[str], sentence: str) -> None:
    assert result.returncode == 1
    assert result.stdout == ""  # it has not even loaded the data
    assert result.stderr.count("\n") == 1
    assert sentence in result.stderr


def test_it_trains_reports_and_draws(tmp_path: Path) -> None:
    plot = tmp_path / "demo.png"
    result = run(str(DEMO), "--quick", "--plot", str(plot))
    assert result.returncode == 0, result.stderr
    for name in ("torch for-loop", "torch foreach", "torch fused", "fusedopt"):
        assert re.search(rf"^{name} +[\d.]+ +[\d.]+ - [\d.]+ +[\d.]+x$", result.stdout, re.M)
    accuracies = re.search(r"^validation accuracy +([\d.]+)% +([\d.]+)%$", result.stdout, re.M)
    assert accuracies is not None
    assert min(map(float, accuracies.groups())) > 80  # chance: 10
    early = re.search(r"difference, 10 steps +(\S+)$", result.stdout, re.M)
    assert early is not None
    assert float(early[1]) < 1e-5

    assert plot.stat().st_size > 10_000
    image = matplotlib.image.imread(plot)
    assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 20


def test_a_plot_that_cannot_be_written_fails_before_training(tmp_path: Path) -> None:
    plot = tmp_path / "absent" / "demo.png"
    assert_one_sentence(run(str(DEMO), "--quick", "--plot", str(plot)), f"cannot write {plot}")


def test_a_whole_training(tmp_path: Path) -> None:
    """By torch and by fusedopt: the same losses, until rounding has grown."""
    plot = tmp_path / "strategy.png"
    result = run(str(DEMO.with_name("strategy.py")), "--epochs", "4", "--plot", str(plot))
    assert result.returncode == 0, result.stderr
    for number in ("1. ", "2. ", "3. ", "4. "):
        assert f"\n{number}" in f"\n{result.stdout}"
    found = re.search(r"^loss of its average +([\d.]+) +([\d.]+)$", result.stdout, re.M)
    assert found is not None
    stock, ours = map(float, found.groups())
    assert ours == pytest.approx(stock, rel=0.01)
    assert ours < 0.5  # ln 10 at the beginning
    assert re.search(r"^best epoch, restored +4 +4$", result.stdout, re.M)  # still improving
    assert plot.stat().st_size > 10_000
    wrong = run(str(DEMO.with_name("strategy.py")), "--epochs", "2")
    assert wrong.returncode == 2
    assert "--epochs: at least 3" in wrong.stderr


@pytest.mark.parametrize("module", ["sklearn", "tqdm", "matplotlib"])
def test_a_missing_package_is_named(tmp_path: Path, module: str) -> None:
    without = (
        f"import runpy, sys; sys.modules[{module!r}] = None; "
        f"sys.argv[1:] = ['--quick', '--plot', {str(tmp_path / 'demo.png')!r}]; "
        f"runpy.run_path({str(DEMO)!r}, run_name='__main__')"
    )
    assert_one_sentence(run("-c", without), module)
    assert not (tmp_path / "demo.png").exists()
