"""Kernels of our own, in C, for CPUs with AVX-512 BF16, where torch's operations are the bottleneck of decoding.

In: dense bfloat16 tensors on the CPU. Out: the same, computed on torch's threads. `cpu.py` binds the C files beside it;
`attention` and `models` call it, and have torch to fall back on where the library or the CPU is missing. It imports
nothing of LightVL.
"""
