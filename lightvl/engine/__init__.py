"""The machine: plans in, tokens out.

in:  `Engine.submit(prompt, params)` from the server; weights, tokenizer and limits through `build.py`, the wiring.
out: a `Generation` of deltas per request; each ends with exactly one last delta or one error.
The loop side (engine) never touches torch; the lane side (runner, inputs, features, sampler) owns all of it, behind
`device.Device.submit(plan)`.
"""
