"""The decoder's cross layers against transformers' Mllama text model, corrected to Meta's rule: rows that see no image
get nothing from the attention branch either (two hooks; facts/mllama.md)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from oracle import Drive, DriveRow, correct_to_metas_rule, save_tiny

from lightvl.attention.cpu import CpuAttention
from lightvl.models.config import decoder_config, read_config
from lightvl.models.decoder import Decoder
from lightvl.models.load import load_weights

PAGE_LEN = 5
TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "cross_attention_layers": [1, 3],
    "rope_parameters": {
        "rope_theta": 500000.0,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Decoder]:
    from transformers import MllamaForCausalLM, MllamaTextConfig

    folder = tmp_path_factory.mktemp("mllama_text")
    oracle = save_tiny(MllamaForCausalLM, MllamaTextConfig(**TEXT), folder)
    correct_to_metas_rule(oracle.model)
    decoder = Decoder(decoder_config(read_config(folder)), torch.float32, torch.device("cpu"))
    load_weights([decoder.weight_part()], folder)
    return oracle, decoder


def oracle_logits(oracle: Any, ids: list[int], states: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
    """sees (len, tiles): which tiles' states (tiles * PAGE_LEN, hidden) each row attends to."""
    mask = sees.repeat_interleave(PAGE_LEN, 1).float()
    row_sees = sees.any(1).float()[:, None]
    bias = (1 - mask) * torch.finfo(torch.float32).min * row_sees  # HF lets unseeing rows attend to all
    with torch.no_grad():
        out = oracle.model(
            input_ids=torch.tensor([ids]),
            cross_attention_states=states[None],
            cross_attention_mask=bias[None, None],
            full_text_row_masked_out_mask=row_sees[None, None],
            use_cache=False,
        )
        return oracle.lm_head(out.last_hidden_state)[0]


def make_drive(decoder: Decoder) -> Drive:
    backend = CpuAttention(
        decoder.config.kv_shape,
        num_pages=64,
        page_size=4,
        dtype=torch.float32,
        num_cross_pages=8,
        cross_page_len=PAGE_LEN,
    )
    return Drive(decoder, backend, page_size=4, num_pages=64)


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    difference = (got.log_softmax(-1) - want.log_softmax(-1)).abs().max()
    assert difference < 1e-4, f"logprobs differ by {difference}"


@pytest.mark.parametrize("cuts", [[0, 30], [0, 3, 8, 9, 20, 30], list(range(31))])
def test_spans_of_two_images(both: tuple[Any, Decoder], cuts: list[int]) -> None:
    """Rows 0-3 see nothing, 4-11 the first image (2 tiles), 12-29 the second (1 tile), beside a text-only sequence."""
    oracle, decoder = both
    torch.manual_seed(0)
    ids, other = torch.randint(0, 320, (2, 30)).tolist()
    states = torch.randn(3 * PAGE_LEN, 64)
    sees = torch.zeros(30, 3, dtype=torch.bool)
    sees[4:12, :2] = True
    sees[12:, 2] = True
    want = oracle_logits(oracle, ids, states, sees)
    with torch.no_grad():
        want_other = oracle(torch.tensor([other]), use_cache=False).logits[0]

    drive = make_drive(decoder)
    images = [(4, 12, (6, 2)), (12, 30, (5,))]
    with torch.inference_mode():
        decoder.write_cross(states[: 2 * PAGE_LEN], (6, 2), drive.attention)
        decoder.write_cross(states[2 * PAGE_LEN :], (5,), drive.attention)
    for start, end in pairwise(cuts):
        spans = [
            (max(first, start) - start, min(last, end) - start, pages)
            for first, last, pages in images
            if max(first, start) < min(last, end)
        ]
        rows = [DriveRow("text", other[start:end]), DriveRow("seeing", ids[start:end], cross=spans)]
        got_other, got = drive.step(rows)
        assert_close(got, want[start:end])
        assert_close(got_other, want_other[start:end])


def test_consecutive_images_are_seen_together(both: tuple[Any, Decoder]) -> None:
    oracle, decoder = both
    torch.manual_seed(1)
    ids = torch.randint(0, 320, (12,)).tolist()
    states = torch.randn(3 * PAGE_LEN, 64)
    sees = torch.zeros(12, 3, dtype=torch.bool)
    sees[2, :1] = True  # the first image token's own row
    sees[3:] = True
    want = oracle_logits(oracle, ids, states, sees)
    drive = make_drive(decoder)
    with torch.inference_mode():
        decoder.write_cross(states[:PAGE_LEN], (1,), drive.attention)
        decoder.write_cross(states[PAGE_LEN:], (2, 3), drive.attention)
    got = drive.step([DriveRow("a", ids, cross=[(2, 3, (1,)), (3, 12, (1, 2, 3))])])[0]
    assert_close(got, want)


def test_rows_before_the_image_do_not_depend_on_it(both: tuple[Any, Decoder]) -> None:
    _, decoder = both
    ids = list(range(10, 22))
    drive = make_drive(decoder)
    with torch.inference_mode():
        decoder.write_cross(torch.randn(PAGE_LEN, 64), (1,), drive.attention)
    alone = drive.step([DriveRow("a", ids)])[0]
    seeing = drive.step([DriveRow("b", ids, cross=[(6, 12, (1,))])])[0]
    torch.testing.assert_close(alone[:6], seeing[:6], rtol=0, atol=1e-5)
    assert (alone[6:] - seeing[6:]).abs().max() > 0.1
