"""The embedded models: small ones of drawn shapes, words and charts, in the Qwen2-VL and the mllama architecture.

demo_path -> the folder of a checkpoint (config, tokenizer, weights), served as any other `--model-path`.
SAMPLE: a picture that all of them describe rightly.
They are made by tools/train_demo.py; the MODEL_CARD.md of each tells what it knows. Nothing here imports torch.
A new embedded model is a new folder here and a new name in `FOLDERS`.
"""

from pathlib import Path

FOLDERS = {"qwen2-vl": "qwen2_vl", "mllama": "mllama"}
DEFAULT = "qwen2-vl"
SAMPLE = Path(__file__).parent / "sample.png"


def demo_path(name: str = DEFAULT) -> Path:
    """The checkpoint folder of the embedded model of this name; KeyError for an unknown name."""
    return Path(__file__).parent / FOLDERS[name]
