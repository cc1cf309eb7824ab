"""config.json in its several shapes; rope against transformers' own formulas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from lightvl.errors import ConfigError
from lightvl.models.config import DEFAULTS, decoder_config
from lightvl.models.rope import Rope, apply_rope

# shortened from the published config.json of each
QWEN2_VL_2B = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vision_config": {"hidden_size": 1536},
    "vocab_size": 151936,
}
LLAMA_3_2_11B = {
    "architectures": ["MllamaForConditionalGeneration"],
    "model_type": "mllama",
    "text_config": {
        "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
        "hidden_size": 4096,
        "model_type": "mllama_text_model",
        "num_hidden_layers": 40,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
    "torch_dtype": "bfloat16",
}
LLAVA_1_5_7B_TEXT = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "vocab_size": 32064}


def test_flat_qwen2_vl() -> None:
    config = decoder_config(QWEN2_VL_2B)
    assert (config.hidden_size, config.num_layers, config.head_dim) == (1536, 28, 128)
    assert (config.num_heads, config.num_kv_heads, config.qkv_bias, config.tied_head) == (12, 2, True, True)
    assert config.mrope_section == (16, 24, 24) and config.rope_scaling is None and config.rope_theta == 1e6
    assert config.max_positions == 32768 and config.stored_dtype == torch.bfloat16
    assert config.kv_shape.bytes_per_token(torch.bfloat16) == 2 * 28 * 2 * 128 * 2


def test_nested_mllama() -> None:
    config = decoder_config(LLAMA_3_2_11B)
    assert config.cross_layers == (3, 8, 13, 18, 23, 28, 33, 38) and config.kv_shape.num_layers == 32
    assert (config.vocab_size, config.embedding_rows) == (128256, 128264) and not config.tied_head
    assert config.rope_scaling is not None and config.rope_scaling.kind == "llama3"
    # facts/mllama.md: 52 MB for each tile
    assert config.kv_shape.bytes_per_cross_page(1601, torch.bfloat16) == 2 * 8 * 1601 * 8 * 128 * 2


def test_fields_left_out_have_transformers_defaults() -> None:
    config = decoder_config({"model_type": "llava", "text_config": LLAVA_1_5_7B_TEXT})
    assert (config.hidden_size, config.num_layers, config.intermediate_size) == (4096, 32, 11008)
    assert (config.vocab_size, config.max_positions, config.rms_eps) == (32064, 4096, 1e-5)


@pytest.mark.parametrize("kind", [kind for kind in DEFAULTS if kind not in ("qwen2_vl", "qwen2_5_vl", "mllama")])
def test_defaults_are_those_of_the_config_classes(kind: str) -> None:
    theirs = CONFIG_MAPPING[kind]().to_dict()
    rope = theirs.pop("rope_parameters")
    assert DEFAULTS[kind] == {name: theirs.get(name, rope["rope_theta"]) for name in DEFAULTS[kind]}


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "mllama", "llama"])
def test_transformers_5_form_equals_the_older_one(kind: str) -> None:
    """What `save_pretrained` of today writes is read as the same decoder."""
    old: dict[str, Any] = {"mllama": LLAMA_3_2_11B, "llama": {"model_type": "llama"}}.get(kind, QWEN2_VL_2B)
    old = {**old, "model_type": kind}
    new = CONFIG_MAPPING[kind](**{key: value for key, value in old.items() if key != "vision_config"}).to_dict()
    assert "rope_parameters" in new.get("text_config", new)
    assert replace(decoder_config(new), stored_dtype=None) == replace(decoder_config(old), stored_dtype=None)


def test_a_sliding_window_bounds_the_context() -> None:
    assert decoder_config({"model_type": "mistral", "sliding_window": 1024}).max_positions == 1024
    windowed = QWEN2_VL_2B | {"use_sliding_window": True, "sliding_window": 4096}
    assert decoder_config(windowed).max_positions == 4096


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not served"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not served"),
        ({"rope_scaling": {"type": "linear"}}, "lacks its factor"),
        ({"hidden_act": "gelu"}, "'gelu' is not served"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "do not fit"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]}}, "mrope_section"),
    ],
)
def test_what_cannot_be_served_exactly_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decoder_config({"model_type": "llama"} | change)


ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512, "truncate": False, "beta_fast": 16},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512, "mscale": 1.0, "mscale_all_dim": 0.5},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512, "attention_factor": 0.7},
]


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_tables_equal_transformers(rope: dict[str, Any], theta: float) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    hf_config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        max_position_embeddings=32768,
        rope_parameters=rope | {"rope_theta": theta},
    )
    positions = torch.tensor([0, 1, 2, 77, 4095, 9000, 32767])
    q, k = torch.randn(7, 4, 128), torch.randn(7, 2, 128)
    cos, sin = LlamaRotaryEmbedding(hf_config)(q, positions[None])
    want_q, want_k = apply_rotary_pos_emb(q[None], k[None], cos, sin, unsqueeze_dim=2)
    ours = Rope(decoder_config(hf_config.to_dict()), torch.device("cpu"))
    got = apply_rope(torch.cat((q, k), 1), *ours.table(positions))
    # angles reach 32767 radians, where float32 keeps 2e-3: the products must be formed as transformers forms them
    torch.testing.assert_close(got, torch.cat((want_q[0], want_k[0]), 1), rtol=0, atol=2e-2)
    torch.testing.assert_close(got[:4], torch.cat((want_q[0], want_k[0]), 1)[:4], rtol=0, atol=1e-4)
