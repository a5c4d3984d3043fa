"""What cannot be written is told in a line, and a file is whole or as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import table

import fusedopt
from fusedopt import __main__
from fusedopt.bench import BenchError, report
from fusedopt.bench.command import _see_whether_writable
from fusedopt.history import History
from fusedopt.output import check_writable, printable, write_whole

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")

PARITY = "parity --optimizer SGD --no-pipeline --case SGD(lr --dtype float64 --steps 1 --shapes 3"
COMMANDS = {"info": "info", "help": "--help", "version": "--version", "parity": PARITY}


def run(arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    root = str(Path(fusedopt.__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-m", "fusedopt", *arguments.split()]
    return subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, **options)


@needs_full
@table("arguments", COMMANDS)
def test_a_full_disk_is_told_in_a_line(arguments: str) -> None:
    with FULL.open("w") as full:
        result = run(arguments, stdout=full)
    assert result.stderr == "fusedopt: cannot write the output: No space left on device\n"
    assert result.returncode == 1


@table("arguments", COMMANDS)
def test_nobody_reads(arguments: str) -> None:
    """As ``| head -1`` leaves it: quiet, and with the status that shells give."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        result = run(arguments, stdout=writing)
    finally:
        os.close(writing)
    assert (result.stderr, result.returncode) == ("", 141)


def test_an_error_of_a_file_is_no_error_of_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(__main__, "info", Path("/no/such/file").read_text)
    monkeypatch.setattr(sys, "argv", ["fusedopt", "info"])
    with pytest.raises(FileNotFoundError):
        __main__.main()


@needs_full
def test_a_report_that_does_not_fit_is_told() -> None:
    result = run(f"{PARITY} --json {FULL}", stdout=subprocess.DEVNULL)
    assert result.stderr == "fusedopt parity: /dev/full: No space left on device\n"
    assert result.returncode == 2
    assert not FULL.is_file()  # it is a device still


@needs_full
def test_a_device_is_written_to_and_not_replaced() -> None:
    history = History()
    history.append(0, loss=1.0)
    for write in (history.to_csv, history.to_json):
        with pytest.raises(OSError, match="No space left"):
            write(FULL)
    assert not FULL.is_file()


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report"
    write_whole(path, "old")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    with pytest.raises(OSError, match="No space left"):
        report.write_csv({"results": []}, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "report"
    check_writable(path)
    assert list(tmp_path.iterdir()) == []
    path.write_text("old")
    check_writable(path)
    assert path.read_text() == "old"
    for wrong in (tmp_path, tmp_path / "none" / "report"):
        with pytest.raises(OSError, match=r"directory"):
            check_writable(wrong)


@pytest.mark.parametrize("name", ["\ud800", "a\ud800.json"])
def test_names_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    history, path = History(), tmp_path / name
    for call in (history.to_csv, history.to_json, check_writable):
        with pytest.raises(ValueError, match=r"no file can be called '.*\\ud800"):
            call(path)
    with pytest.raises(BenchError, match=r"no file can be called '.*\\ud800"):
        _see_whether_writable(path)


def test_what_is_no_character_is_escaped(tmp_path: Path) -> None:
    """A file's name may have any bytes; Python reads them as half characters."""
    assert printable("ü\udcff") == "ü\\udcff"
    spread = {"median": 1.0, "low": 1.0, "high": 1.0}
    row = {
        "case": "a\udcff.pt",
        "contenders": {"ours": {"ms": spread, "gb_per_s": 1.0}},
        "time_relative_to_ours": {},
    }
    report.write_csv({"results": [row]}, tmp_path / "some.csv")
    assert "a\\udcff.pt" in (tmp_path / "some.csv").read_text(encoding="utf-8")


def test_what_is_no_character_is_printed() -> None:
    code = "import sys, fusedopt.__main__ as m; m.info = lambda: 'a\\udcff'; m.main()"
    root = str(Path(fusedopt.__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(
        [sys.executable, "-c", code, "info"], env=environment, capture_output=True, text=True
    )
    assert (result.stdout, result.returncode) == ("a\\udcff\n", 0)
