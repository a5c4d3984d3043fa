"""How much memory a step takes for itself: ``python memory.py CASE OPTIMIZER CONTENDER``.

Prints bytes. A process of its own, because memory that an earlier contender gave back to the
allocator, but the allocator not to the system, would hide what this one takes. Needs Linux.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cases import CASES, CONTENDERS, OPTIMIZERS, gradients


def step_bytes(case: str, optimizer: str, contender: str) -> int:
    """Bytes by which the memory in use rises during a step, measured in a new process.

    Raises:
        RuntimeError: It failed; with the last line of its error output.
    """
    command = [sys.executable, str(Path(__file__).resolve()), case, optimizer, contender]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return int(done.stdout.split()[-1])


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024 * int(value.split()[0])
    raise RuntimeError(f"/proc/self/status has no {field}")


def _measure(case: str, optimizer: str, contender: str) -> int:
    grads = gradients(CASES[case])
    step = CONTENDERS[contender](CASES[case], OPTIMIZERS[optimizer], grads)
    step()  # creates the state
    step()
    # Unlike getrusage's maximum, which a new process takes over from its parent, the kernel's
    # high-water mark is this program's own and can be set back to what is in use now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step()
    return max(0, _status("VmHWM") - before)


if __name__ == "__main__":
    print(_measure(*sys.argv[1:]))
