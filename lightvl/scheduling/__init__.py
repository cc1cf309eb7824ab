"""What runs next, as plain Python: no torch, no asyncio, no clock.

in:  sequences (a prompt, its images, its limits) from the engine; outcomes of completed steps; sampled tokens.
out: StepPlans: rows to compute, encodes to go on with, images to forget, pages to copy.
Layers, lower first: pages, image_store -> radix_cache -> allocation -> admission, rows, budget -> scheduler.
A new resource belongs into allocation (who holds it, when it is let go); a new policy into scheduler or admission.
"""
