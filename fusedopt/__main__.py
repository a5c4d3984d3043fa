"""The command line, ``fusedopt`` or ``python -m fusedopt``: what this installation is and does."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from contextlib import suppress

import torch

import fusedopt
from fusedopt import parity_command
from fusedopt.bench import command as bench
from fusedopt.extension import build_info


def info() -> str:
    """Versions, instruction set, threads and CUDA, one to a line."""
    lines = {
        "fusedopt": fusedopt.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "platform": platform.platform(),
        **build_info(),
    }
    return "\n".join(f"{name:16} {value}" for name, value in lines.items())


def main() -> None:
    """Run the command line.

    Ends with 1 and a line when the output cannot be written, and with 141, as shells have it, when
    nobody reads it any more.
    """
    if hasattr(sys.stdout, "reconfigure"):  # names of files may be no text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            _run()
        finally:
            if sys.stdout is not None:  # there may be none
                sys.stdout.flush()  # here it can still be told
    except BrokenPipeError:
        _close_stdout()
        sys.exit(128 + 13)  # of SIGPIPE
    except OSError as error:
        if error.filename is not None:
            raise
        _close_stdout()
        print(f"fusedopt: cannot write the output: {error.strerror}", file=sys.stderr)
        sys.exit(1)


def _close_stdout() -> None:
    """Send what is left of it nowhere: Python would try again at its end."""
    with suppress(OSError, ValueError):  # it may be no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _run() -> None:
    parser = argparse.ArgumentParser(prog="fusedopt", description=__doc__)
    parser.add_argument("--version", action="version", version=f"fusedopt {fusedopt.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    commands.add_parser("info", help="versions, instruction set, threads, CUDA").set_defaults(
        run=lambda _: print(info())
    )
    bench.add_command(commands)
    parity_command.add_command(commands)
    options = parser.parse_args()
    sys.exit(options.run(options))


if __name__ == "__main__":
    main()
