"""With ``--device fake``, the emulated GPU of the tests in the place of CUDA.

Imported by scripts before fusedopt: what they do on a GPU can so be tried where there is none.
"""

from __future__ import annotations

import sys
from pathlib import Path

if "fake" in sys.argv and "fusedopt" not in sys.modules:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    import fake_cuda

    fake_cuda.install()
