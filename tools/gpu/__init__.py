"""The parts of `tools/gpu_check.py`, one module each, and what they share.

gpu_check (names of parts) -> runner (a process per part, its time, its rows) -> report (table, JSON, comparison)
part(Context) -> rows          kernels · attention · families · graphs · speed · memory · server
served                         a real-size model of random weights, for speed and memory
modules (which kernels LightVL calls) -> build_kernels (nvcc) -> wheel (a package that flashinfer finds)
"""
