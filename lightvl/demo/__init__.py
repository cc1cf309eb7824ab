"""The embedded model: a small Qwen2-VL-style model of drawn shapes, in the package.

demo_path -> the folder of its checkpoint (config, tokenizer, weights), served as any other `--model-path`.
It is made by tools/train_demo.py; qwen2_vl/MODEL_CARD.md tells what it knows. Nothing here imports torch.
A new embedded model is a new folder here and a new name in `demo_path`.
"""

from pathlib import Path


def demo_path(name: str = "qwen2-vl") -> Path:
    """The checkpoint folder of the embedded model of this name; KeyError for an unknown name."""
    return Path(__file__).parent / {"qwen2-vl": "qwen2_vl"}[name]
