"""The device that tests run on: ``pytest --device fake`` or ``cuda`` instead of the CPU."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("schedules")  # which then tells what was compared, as tests do


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        choices=("cpu", "fake", "cuda"),
        help="where models are: on the CPU, an emulated GPU (emulation.py), or a real one",
    )


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("--device")
    if device == "fake":
        import emulation

        emulation.install()
    if device == "cuda":  # what torch does about it is all that there is to do
        about = "Attempting to run cuBLAS, but there was no current CUDA context"
        config.addinivalue_line("filterwarnings", f"ignore:{about}")
    if device != "cpu":
        import torch

        torch.set_default_device(device)
        if device == "fake":
            # Autograd has a thread for each device, and each thread its own OpenMP team: on few
            # processors they keep each other from working.
            torch.set_num_threads(1)
