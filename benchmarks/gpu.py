"""AdamW on a GPU, with and without clipping: ``fusedopt bench`` with ``make gpu-report``'s choice.

    python benchmarks/gpu.py --json gpu.json

Further arguments are those of ``fusedopt bench``. Results are written after each model.
"""

from __future__ import annotations

import sys

from fusedopt.bench import command

CHOICE = (
    "--device cuda --optimizer adamw --clip --contender foreach fused limit "
    "--passes 1 --rounds 15 --budget 3"
)

if __name__ == "__main__":
    command.main([*CHOICE.split(), *sys.argv[1:]])
