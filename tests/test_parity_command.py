"""`fusedopt parity`: it finds what is wrong, and says so in its table, report and exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_tensor, table

import fusedopt
from fusedopt import __main__, parity
from fusedopt import parity_command as parity_module
from fusedopt.cases import CASES, PIPELINE, Case
from fusedopt.models import Model
from fusedopt.parity import LAYOUTS, Layout, measure
from fusedopt.parity_command import layouts_of

QUICK = ["--optimizer", "AdamW", "--no-pipeline", "--case", "AdamW()"]


def parity_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fusedopt", "parity", *arguments])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


# --- What it says ---------------------------------------------------------------------------------


def test_passes_and_writes_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    arguments = ["--dtype", "float32", "bfloat16", "--seed", "3", "--json", str(path)]
    assert parity_command(monkeypatch, *QUICK, *arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""  # no progress bar where nobody watches
    head, *rows, summary = out.splitlines()
    assert head.split()[:2] == ["case", "dtype"]
    assert [row.split()[:2] for row in rows] == [["AdamW()", "float32"], ["AdamW()", "bfloat16"]]
    assert all(row.endswith("equal   pass") for row in rows)
    assert summary.startswith("2 of 2 pass: fusedopt ")
    report = json.loads(path.read_text())
    assert report["failed"] == 0
    assert report["torch"] == torch.__version__
    assert report["seed"] == 3
    shapes = "() 0 1 3 17 31 4097 33x7 128x129 100@1"
    assert report["shapes"]["float32"] == shapes.split()
    assert {"fusedopt", "build", "python", "platform", "device", "device name"} <= report.keys()
    first, second = report["rows"]
    assert (first["compared"], first["steps"]) == ("the end of the run", 100)
    assert (second["compared"], second["steps"]) == ("each step", 12)
    assert first["values"].keys() == {"weight", "exp_avg", "exp_avg_sq"}
    assert second["values"]["weight"]["ours"]["largest_ulp"] <= 0.52
    assert second["step_counters_equal"] is True


def test_names_of_optimizers_in_any_case(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "--optimizer adamW rmsprop --no-pipeline --dtype float32 --steps 1 --shapes 3"
    assert parity_command(monkeypatch, *arguments.split()) == 0
    rows = capsys.readouterr().out.splitlines()[1:-1]
    assert {row.split("(")[0] for row in rows} == {"AdamW", "RMSprop"}


def test_options_choose_the_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "--optimizer SGD Adagrad --case l1 --dtype float16 --steps 2 --shapes ();0;7@3"
    assert parity_command(monkeypatch, *arguments.split()) == 0
    rows = capsys.readouterr().out.splitlines()[1:-1]
    assert [row.split("(")[0] for row in rows] == ["SGD", "Adagrad"]


def test_module_runs_as_a_command() -> None:
    command = [sys.executable, "-m", "fusedopt", "parity", *QUICK, "--dtype", "float64"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "1 of 1 pass" in result.stdout


def test_progress_bar_where_someone_watches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert parity_command(monkeypatch, *QUICK, "--dtype", "float16") == 0
    out, err = capsys.readouterr()
    assert "1 of 1 pass" in out
    assert "0/1" in err


WRONG = {
    "optimizer": (["--optimizer", "AdamX"], "argument --optimizer: invalid choice: 'AdamX'"),
    "dtype": (["--dtype", "float8"], "argument --dtype: invalid choice: 'float8'"),
    "case": (["--case", "amsgrat"], "argument --case: no case"),
    "case_and_dtype": (["--case", "l1", "--dtype", "complex64"], "argument --dtype: none"),
    "no_steps": (["--steps", "0"], "argument --steps: not a whole number from 1 on: '0'"),
    "fractional_steps": (["--steps", "1.5"], "argument --steps: not a whole number"),
    "seed": (["--seed", "-1"], "argument --seed: not a whole number from 0 on: '-1'"),
    "shapes": (["--shapes", "3;4y"], "argument --shapes: '4y' is not a shape"),
    "no_shapes": (["--shapes", ""], "argument --shapes: '' is not a shape"),
    "device": (["--device", "toaster"], "argument --device: no device 'toaster' here"),
    "meta": (["--device", "meta"], "argument --device: no device 'meta' here"),
    "too_large": (["--shapes", "99999999999"], "argument --shapes: that takes some "),
    "model": (["--model", "gpt5"], "argument --model: no model 'gpt5'"),
    "missing_model": (["--model", "a.safetensors"], "argument --model: a.safetensors: no such"),
    "json": (["--json", "/no/such/folder/x.json"], "argument --json: "),
    "model_and_shapes": (["--model", "resnet50", "--shapes", "3"], "not allowed with"),
}


@table("wrong", WRONG)
def test_wrong_arguments_are_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wrong: tuple[list[str], str],
) -> None:
    arguments, message = wrong
    assert parity_command(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"error: {message}" in err or message in err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parity_command(monkeypatch, "--device", "cuda:1") == 2
    assert "argument --device: no device 'cuda:1' here: " in capsys.readouterr().err


# --- What it finds --------------------------------------------------------------------------------


class ScaledRate(fusedopt.Adam):
    """A learning rate that is off by a hundred-thousandth."""

    def _fused_step(self, stream: bool = False) -> None:
        group = self.param_groups[0]
        rate = group["lr"]
        group["lr"] = rate * (1 + 1e-5)
        super()._fused_step(stream)
        group["lr"] = rate


def after_each_step(change: Any) -> type:
    class Wrong(fusedopt.AdamW):
        def _fused_step(self, stream: bool = False) -> None:
            super()._fused_step(stream)
            param = max((p for g in self.param_groups for p in g["params"]), key=torch.numel)
            with torch.no_grad():
                change(param, self.state[param])

    return Wrong


def flip_the_last_bits(param: Any, state: Any) -> None:
    """Of some weights; in 16 bits, which rounds them otherwise than float64's are."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[param.itemsize]
    param.view(-1).view(kind)[::8] ^= {2: 1, 4: 31, 8: 2**14 - 1}[param.itemsize]


def flip_one_bit(param: Any, state: Any) -> None:
    param.view(-1).view(torch.int16 if param.itemsize == 2 else torch.int32)[7] ^= 1024


def spoil_state(param: Any, state: Any) -> None:
    state["exp_avg"].view(-1)[5] += 0.125


def make_nan(param: Any, state: Any) -> None:
    param.view(-1)[3] = torch.nan


def forget_a_step(param: Any, state: Any) -> None:
    state["step"] -= 1


def state_in_float32(param: Any, state: Any) -> None:
    state["exp_avg"].copy_(state["exp_avg"].float())


def a_little_noise(param: Any, state: Any) -> None:
    param += 1e-12 * random_tensor(param.shape, param.dtype, 0).to(param.device)


FAULTS = {
    "last_bits": flip_the_last_bits,
    "one_bit": flip_one_bit,
    "state": spoil_state,
    "nan": make_nan,
    "counter": forget_a_step,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@table("fault", FAULTS)
def test_faults_are_found(monkeypatch: pytest.MonkeyPatch, fault: Any, dtype: torch.dtype) -> None:
    monkeypatch.setattr(fusedopt, "AdamW", after_each_step(fault))
    result = measure(Case("AdamW", {"lr": 0.01}), dtype)
    assert not result.passed
    if fault is forget_a_step:
        assert result.counters_equal is False


@table("fault", {"state": state_in_float32, "noise": a_little_noise})
def test_faults_of_float64_are_found(monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    monkeypatch.setattr(fusedopt, "AdamW", after_each_step(fault))
    assert not measure(Case("AdamW"), torch.float64).passed


# In bfloat16, a decay in the gradient hides it, and so does what squares begin with.
WITH_EPS = [
    (case, dtype)
    for case in CASES
    for dtype in (torch.float32, torch.float64, torch.bfloat16)
    if case.name not in ("SGD", "Momentum")
    and (
        dtype != torch.bfloat16
        or case.name == "AdamW"
        or not {"weight_decay", "initial_accumulator_value"} & case.options.keys()
    )
]


@pytest.mark.parametrize("eps", ["none", "ten times"])
@pytest.mark.parametrize(("case", "dtype"), WITH_EPS, ids=str)
def test_another_eps_is_found(
    monkeypatch: pytest.MonkeyPatch, case: Case, dtype: torch.dtype, eps: str
) -> None:
    ours = Case.ours

    def changed(self: Case, params: Any) -> Any:
        optimizer = ours(self, params)
        group = optimizer.param_groups[0]
        group["eps"] = 0.0 if eps == "none" else 10 * group["eps"]
        return optimizer

    monkeypatch.setattr(Case, "ours", changed)
    assert not measure(case, dtype, steps=5).passed


OTHER_SHAPES = {
    "few": [Layout((3,))],
    "empty": [Layout((0,))],
    "small": [Layout((64, 64)), Layout((64,)), Layout((256, 64)), Layout((3,))],
    "a_tensor": [Layout((200, 300)), Layout((300,))],
    "thousand": [Layout((1000,)), Layout((77, 5))],
}


@pytest.mark.parametrize("seed", [1, 2])
@table("layouts", OTHER_SHAPES)
def test_other_shapes_and_seeds_pass(layouts: list[Layout], seed: int) -> None:
    """Luck is nobody's fault: here, where it is most at work."""
    for case, dtype in (
        (Case("Adam", {"lr": 0.01, "weight_decay": 0.1}, {"max_grad_norm": 10.0}), torch.complex64),
        (
            Case("Adam", {"lr": 0.01, "weight_decay": 0.1}, {"weight_precision": "stochastic"}),
            torch.float16,
        ),
        (Case("RMSprop", {"lr": 0.01, "centered": True}), torch.float32),
        (Case("RMSprop", {"lr": 0.01, "centered": True}), torch.float16),
        (Case("AdamW"), torch.bfloat16),
    ):
        assert measure(case, dtype, layouts, seed=seed, steps=10).problems == []


def test_a_wrong_rate_fails_and_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(fusedopt, "Adam", ScaledRate)
    path = tmp_path / "report.json"
    arguments = ["--optimizer", "Adam", "--case", "Adam()", "--dtype", "float32"]
    assert parity_command(monkeypatch, *arguments, "--json", str(path)) == 1
    out = capsys.readouterr().out
    assert "FAIL: weight: 50% of the errors are above " in out
    assert "0 of 1 pass" in out
    (row,) = json.loads(path.read_text())["rows"]
    assert row["verdict"] == "FAIL"
    assert row["problems"]


def test_an_error_in_a_step_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def out_of_order(param: Any, state: Any) -> None:
        raise RuntimeError("device out of order")

    monkeypatch.setattr(fusedopt, "AdamW", after_each_step(out_of_order))
    assert parity_command(monkeypatch, *QUICK, "--dtype", "float32") == 1
    assert "FAIL: RuntimeError: device out of order" in capsys.readouterr().out


@pytest.mark.parametrize("error", [KeyboardInterrupt(), TypeError("not callable")], ids=repr)
def test_nothing_is_lost_when_it_ends_early(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    error: BaseException,
) -> None:
    def measured(case: Case, dtype: torch.dtype, *_: Any, **__: Any) -> Any:
        if dtype == torch.bfloat16:
            raise error
        return measure(case, dtype, steps=2)

    monkeypatch.setattr(parity_module, "measure", measured)
    path = tmp_path / "report.json"
    code = parity_command(
        monkeypatch, *QUICK, "--dtype", "float32", "bfloat16", "--json", str(path)
    )
    report = json.loads(path.read_text())
    out, err = capsys.readouterr()
    if isinstance(error, KeyboardInterrupt):
        assert (code, len(report["rows"]), report["rows not measured"]) == (130, 1, 1)
        assert err == "fusedopt parity: interrupted\n"
        assert "1 of 1 pass (1 not measured)" in out
    else:
        assert (code, len(report["rows"]), report["rows not measured"]) == (1, 2, 0)
        assert "FAIL: TypeError: not callable" in out


def test_what_is_left_to_torch_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = torch.zeros(5)
    shared = [torch.nn.Parameter(memory[:3]), torch.nn.Parameter(memory[2:])]
    monkeypatch.setattr(parity, "make_params", lambda *_: shared)
    result = measure(CASES[0], torch.float32, steps=1)
    assert any("to torch's own" in problem for problem in result.problems)


PIPELINE_FAULTS = {
    "clip": ({"max_grad_norm": 10.0}, "max_grad_norm", 10.001, torch.float32),
    "value": ({"max_grad_value": 0.5}, "max_grad_value", 0.50001, torch.float32),
    "l1": ({"l1": 0.1}, "l1", 0.10001, torch.float32),
    "ema": ({"ema_decay": 0.95}, "ema_decay", 0.9501, torch.bfloat16),
    "nearest": ({"weight_precision": "stochastic"}, "weight_precision", "nearest", torch.float16),
    "state": ({"state_dtype": torch.bfloat16}, "state_dtype", torch.float32, torch.float32),
}


@table("fault", PIPELINE_FAULTS)
def test_faults_in_the_pipeline_are_found(
    monkeypatch: pytest.MonkeyPatch, fault: tuple[dict[str, Any], str, Any, torch.dtype]
) -> None:
    """The option does something else than it says."""
    options, name, value, dtype = fault
    case = Case("SGD", {"lr": 0.05, "momentum": 0.9}, options)
    assert measure(case, dtype).passed
    ours = Case.ours
    monkeypatch.setattr(Case, "ours", lambda self, params: changed(ours(self, params)))

    def changed(optimizer: Any) -> Any:
        setattr(optimizer, name, value)
        return optimizer

    assert not measure(case, dtype).passed


# --- Shapes ---------------------------------------------------------------------------------------


def test_layouts_are_what_they_say() -> None:
    params = parity.make_params(LAYOUTS)
    assert [tuple(p.shape) for p in params] == [layout.shape for layout in LAYOUTS]
    assert params[-1].data_ptr() % 16 == 4
    assert {p.numel() for p in params} >= {0, 1, 3, 17, 31, 4097}


def test_slices_are_measured_like_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = [Layout((300,)) for _ in range(5)]
    monkeypatch.setattr(parity, "SLICE", 700)
    result = measure(CASES[0], torch.bfloat16, layouts, steps=2)
    assert result.passed
    assert result.values["exp_avg"].ours.count == 5 * 300 * 2


def test_a_model_is_taken_by_its_shapes() -> None:
    shapes = ((5000, 1000), (7,), (7,), (300, 300), (300, 300), (2, 5_000_000))
    model = Model("model", shapes)
    layouts = layouts_of(model, [torch.float32])[torch.float32]
    expected = [(1048, 1000), (7,), (7,), (300, 300), (1, 1048576)]
    assert [layout.shape for layout in layouts] == expected
    halves = Model("model", shapes, (torch.bfloat16,) + 5 * (torch.float16,))
    assert {d.itemsize for d in layouts_of(halves)} == {2}
    assert len(layouts_of(halves)[torch.bfloat16]) == 1


def test_model_of_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.pt"
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.LayerNorm(3)).bfloat16()
    torch.save(model.state_dict(), path)
    assert parity_command(monkeypatch, "--model", str(path), "--optimizer", "Adagrad") == 0
    rows = capsys.readouterr().out.splitlines()[1:-1]
    assert rows
    assert all(row.split()[1] == "bfloat16" for row in rows)


def test_the_table_has_every_optimizer_and_option() -> None:
    assert {case.name for case in CASES} == set(fusedopt.__all__) - {"__version__"}
    assert {case.name for case in PIPELINE} == {case.name for case in CASES}
    options = {name for case in PIPELINE for name in case.pipeline}
    assert options == set(fusedopt.options.ARGUMENTS)
