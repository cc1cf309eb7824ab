"""Bytes in, pixels out. Knows no prompts, models or requests.

fetch:       an http(s) URL, data URL or base64 string -> `EncodedImage` (bytes and their digest), within limits
decode:      encoded bytes -> RGB uint8 (height, width, 3), EXIF turned, alpha on white; its content digest
transforms:  RGB -> resized, padded, tiled or patchified uint8 arrays, as the HF processors do
cache:       a byte-bounded LRU, shared work in flight, and the counters of all that
"""
