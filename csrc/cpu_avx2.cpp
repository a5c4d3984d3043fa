// The CPU kernels for AVX2; the flags are in setup.py.
#define FUSEDOPT_ISA avx2
#include "cpu.inl"
