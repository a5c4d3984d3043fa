"""Steps for a kernel profiler: one of each kind, after two that warm up.

    ncu --profile-from-start off --clock-control none python benchmarks/kernels.py

``make gpu-report`` does so. Each kind is one or two kernels, in the order that is printed.
"""

from __future__ import annotations

import torch

import fusedopt
from fusedopt.bench.contenders import OPTIMIZERS, Case, Gradients
from fusedopt.models import find

BF16 = torch.bfloat16
FLOAT32 = torch.float32
# Of AdamW, but for the last ones: model, dtype of the weights, options.
KINDS = {
    "float32": ("1x100M", FLOAT32, {}),
    "float32, clipped": ("1x100M", FLOAT32, {"max_grad_norm": 1.0}),
    "float32, averaged": ("1x100M", FLOAT32, {"ema_decay": 0.999}),
    "bfloat16 state": ("1x100M", FLOAT32, {"state_dtype": BF16}),
    "8-bit state": ("1x100M", FLOAT32, {"state_dtype": torch.uint8}),
    "bfloat16": ("1x100M", BF16, {}),
    "bfloat16, master": ("1x100M", BF16, {"weight_precision": "master"}),
    "bfloat16, remainder": ("1x100M", BF16, {"weight_precision": "remainder"}),
    "bfloat16, clipped": ("1x100M", BF16, {"max_grad_norm": 1.0}),
    "1000 tensors": ("1000x1024", FLOAT32, {}),
    "10000 tensors": ("10000x64", FLOAT32, {}),
}


def main() -> None:
    device = torch.device("cuda", 0)
    for kind, (model, dtype, options) in KINDS.items():
        case = Case(find(model), OPTIMIZERS["adamw"], device, dtype)
        params = Gradients(case).parameters()
        optimizer = fusedopt.AdamW(params, **case.optimizer.options, **options)
        for _ in range(2):
            optimizer.step()
        torch.cuda.synchronize()
        print(kind, flush=True)
        torch.cuda.profiler.start()
        optimizer.step()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        del params, optimizer
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
