// The CPU kernels for AVX-512; the flags are in setup.py.
#define FUSEDOPT_ISA avx512
#include "cpu.inl"
