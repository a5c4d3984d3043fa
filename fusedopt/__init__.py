"""Fused C++ optimizers for PyTorch: replace ``torch.optim.X`` by ``fusedopt.X``.

Same arguments, same numbers, same checkpoints; one pass over the whole model per step.
"""

from fusedopt.optimizers import SGD, Adagrad, Adam, AdamW, Momentum, RMSprop

__version__ = "0.1.0"

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "Momentum", "RMSprop", "__version__"]
