"""Checkpoints in, logits and image features out. Nothing here knows about requests, sequences or pages' owners.

config    config.json -> DecoderConfig (HF field names end here)     load    names and tensors -> parts, each used once
decoder   StepInputs -> logits: one decoder, options as data          layers, rope, linear    what it is made of
family    the protocol of an image side; families/ has them, vision/ their towers
shards    the weight files of a folder, and the names in each
model     a checkpoint folder -> Model, what the engine's runner drives
"""
