"""The command line, ``fusedopt`` or ``python -m fusedopt``: what this installation is and does."""

from __future__ import annotations

import argparse
import platform
import sys

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
    """Run the command line."""
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
