"""Vision towers: bytes of patches in, features of the decoder's width out.

    config      config.json, preprocessor_config.json -> frozen shapes and pixel settings
    clip_siglip the towers of the LLaVA models: views of bytes -> features; llava_config, projector belong to them
    vit         what the towers share: patch embedding from bytes, norms, MLPs, attention of unequal lengths
    qwen_vl     Qwen2-VL and Qwen2.5-VL: uint8 patches, grid -> (tokens, hidden)
    mllama      Llama-3.2-Vision: uint8 patches of real tiles, aspect ratio id -> (tiles * tile_len, hidden)

A tower's `encode` is a generator that yields None between bounded pieces of work. Towers know no requests, no prompts.
"""
