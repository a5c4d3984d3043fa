// The CPU kernels for the oldest processor of the architecture; the flags are in setup.py.
#define FUSEDOPT_ISA base
#include "cpu.inl"
