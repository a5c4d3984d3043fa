"""How fast a step is: against stock torch, against its peers and against the memory itself.

``fusedopt bench`` is the command (:mod:`fusedopt.bench.command`); ``docs/performance.md`` explains
it. Imports go down this list: ``command``, ``plot``, ``report``, ``race``, ``memory``,
``contenders``, ``machine``, ``measure``.
"""


class BenchError(ValueError):
    """What was asked for cannot be measured or drawn; the message says why."""
