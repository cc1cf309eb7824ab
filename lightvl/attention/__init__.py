"""Keys, values and attention over them: a step's tensors in, attended rows out.

base      the seams: StepInputs, AttentionBackend, FixedDecode, EncoderAttention
ops       the elementwise operations between matmuls, chosen by device
store     K,V in pages, for self-attention and for the cross attention of images; KVShape: what a page costs
transfer  host tensors on their way to a device
cpu       CpuAttention, encoder_attention: the seams on a CPU
cuda      CudaAttention and, beside it: cuda_plan (a step's rows as kernels want them) -> cuda_kernels (flashinfer's
          wrappers) -> cuda_graph (decode in CUDA graphs); cuda_encoder (vision towers), cuda_ops, cuda_library
Knows tensors, pages and row lengths; nothing of models, sequences or requests.
"""
