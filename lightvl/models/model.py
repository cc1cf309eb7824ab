"""A loaded model: the decoder, its family, and how both come from a checkpoint folder.

The engine's runner calls `forward`, and the family's functions, on the lane thread. Knows nothing about requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lightvl.attention.base import AttentionBackend, StepInputs
from lightvl.models.config import DecoderConfig, read_config
from lightvl.models.decoder import Decoder
from lightvl.models.families import build_family
from lightvl.models.family import Family
from lightvl.models.load import LoadFormat, load_weights


@dataclass(frozen=True, slots=True)
class Model:
    decoder: Decoder
    family: Family
    config: DecoderConfig
    dtype: torch.dtype
    device: torch.device

    def load(self, checkpoint: Path, load_format: LoadFormat = "auto") -> None:
        """Fill decoder, tower and projector. Raises ConfigError."""
        with torch.inference_mode():
            parts = [self.decoder.weight_part(), *self.family.weight_parts()]
            load_weights(parts, checkpoint, load_format, device=self.device)

    def forward(self, inputs: StepInputs, attention: AttentionBackend) -> torch.Tensor | None:
        """One step: prepare the backend, then the decoder. Logits (S, vocab_size), or None when none are wanted."""
        attention.prepare(inputs)
        return self.decoder.forward(inputs, attention)


def build_model(
    checkpoint: Path, *, dtype: torch.dtype, device: torch.device, max_image_tokens: int | None = None
) -> Model:
    """The family that config.json names and the decoder, without weights. Raises ConfigError."""
    hf_config = read_config(checkpoint)
    with torch.inference_mode():
        family = build_family(hf_config, checkpoint, dtype=dtype, device=device, max_image_tokens=max_image_tokens)
        decoder = Decoder(family.decoder_config, dtype, device)
    return Model(decoder, family, family.decoder_config, dtype, device)
