"""Keys, values and attention over them: a step's tensors in, attended rows out.

base    the seam: StepInputs, AttentionBackend, EncoderAttention
store   PageStore: K,V in pages, for self-attention and for the cross attention of images; KVShape: what a page costs
cpu     CpuAttention, encoder_attention: both seams in torch
Knows tensors, pages and row lengths; nothing of models, sequences or requests.
"""
