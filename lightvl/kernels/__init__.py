"""Kernels of our own, where torch's operations are the bottleneck: in C for CPUs with AVX-512 BF16, for decoding; in
Triton for GPUs, for vision towers.

In: dense tensors. Out: the same, computed on torch's threads, or on the current stream. `cpu.py` and `cpu_layers.py`
bind the C files beside them, `cuda.py` the Triton kernels; `attention` and `models` call them, and have torch to fall
back on where a compiler or the CPU is missing. They import nothing of LightVL.
"""
