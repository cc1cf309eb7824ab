"""The world of the embedded model that ships now: what it was taught, and its held-out cases, for tools/eval_demo.py.

Goes when weights of the next recipe (the modules above this folder) are shipped.
"""
