"""Loads the compiled extension, ``fusedopt._C``; the only module that does.

``kernels`` is the extension, connected to torch.
"""

from __future__ import annotations

import torch

if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(f"fusedopt needs torch 2.10 or later; this is torch {torch.__version__}.")

try:
    # After torch, so that the extension shares torch's OpenMP threads.
    import fusedopt._C as kernels
except ImportError as error:
    raise ImportError(
        f"fusedopt's compiled extension cannot be loaded ({error}). In a checkout, build it with "
        "`pip install -e .`; elsewhere, reinstall fusedopt."
    ) from error

kernels.bind_torch(torch.Tensor, torch.nn.Parameter)
ISA = kernels.cpu_isa()
# The torch.device type that there are kernels for beside the CPU's; empty without any.
DEVICE = kernels.device_type()


def build_info() -> dict[str, str]:
    """What ``python -m fusedopt info`` prints about the extension."""
    threads = torch.get_num_threads()
    return {
        "instruction set": f"{ISA} (of: {kernels.cpu_isas()})",
        "threads": str(threads) if kernels.cpu_has_threads() else "1 (built without OpenMP)",
        "CUDA": (
            f"compiled for {kernels.cuda_architectures()}; {kernels.cuda_device_count()} device(s)"
            if DEVICE
            else "no (built without nvcc)"
        ),
    }


__all__ = ["DEVICE", "ISA", "build_info", "kernels"]
