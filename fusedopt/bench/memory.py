"""How much memory a step on the CPU takes for itself. Needs Linux."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

from fusedopt.bench.contenders import CONTENDERS, Case, Gradients


def step_bytes(case: Case, contender: str) -> int:
    """Bytes by which the memory in use rises during a step, measured in a new process.

    In a new one, because memory that an earlier contender gave back to the allocator, but the
    allocator not to the system, would hide what this one takes. And not in one of
    ``multiprocessing``, which would run the caller's own script again.

    Raises:
        RuntimeError: It could not be measured.
    """
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=pickle.dumps((case, contender)),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if done.returncode:
        raise RuntimeError(done.stderr.decode(errors="replace").strip())
    return int(done.stdout.split()[-1])  # libraries may have printed something before


def _measure(case: Case, contender: str) -> int:
    step = CONTENDERS[contender](case, Gradients(case))
    step()  # creates the state
    step()
    # Unlike getrusage's maximum, which a new process takes over from its parent, the kernel's
    # high-water mark is this program's own and can be set back to what is in use now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024 * int(value.split()[0])
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    print(_measure(*pickle.load(sys.stdin.buffer)))
