"""Chooses the next token of each sampled row, on the device that holds the logits.

Called by the runner on the lane thread, in inference mode. Must not know: sequences, pages, text. Nothing here waits
for a GPU; settings of the rows become tensors once and are reused while the same rows are sampled.

The order is that of HF and SGLang: repetition penalty, then what is added (frequency and presence penalty, bias, minus
infinity where it is too early to stop or the grammar has no such token), then temperature, top_k, top_p, min_p, draw.
All filters of a row are one threshold on its logits, so tokens that tie with the last one kept are kept too. (HF keeps
them for top_k and breaks ties arbitrarily for top_p. bf16 logits tie often, and a choice must not depend on how some
sort orders equal numbers.)

A draw is Gumbel-argmax: the greatest sum of a score and the noise of (seed, choice, position, token id).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import repeat
from typing import Any

import numpy as np
import torch

from lightvl.attention.transfer import to_device
from lightvl.core import Matcher, SamplingParams, TokenLogprob
from lightvl.engine.noise import UInt64Array, gumbel_noise, hash_choices, hash_positions
from lightvl.engine.renorm import kept_tokens, renorm_for
from lightvl.engine.stream import Stream

# Measured on one core with rows of 152k logits (tools/LOG.md).
NUM_HEAD = 1024  # best logits in which a threshold is looked for first: 0.7 ms a row, sorting all takes 13
HEAD_GROWTH = 16  # if these do not suffice, look among so many times more
CPU_BLOCK = 1 << 21  # logits drawn from at once: temporaries of 64 rows would be mapped anew each time, 3 times slower
TIE_SLACK = 64  # a head of top_k + 64 mostly holds all ties of the last
LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot say, as in OpenAI's API
BROKEN = -1  # token id of a row without a finite logit: the model failed on this sequence alone


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One sampled sequence. Rows stand in the order of the logits handed over."""

    params: SamplingParams
    choice: int
    position: int  # index of the token being sampled in its sequence: prompt and earlier outputs lie before it
    seen: np.ndarray[Any, np.dtype[np.int64]] | None = None  # prompt and outputs; where `params.needs_history`
    prompt_len: int = 0  # tokens before `position` that were not generated
    matcher: Matcher | None = None  # of `params.grammar`


@dataclass(slots=True)
class Sampled:
    """S rows, W of which want logprobs, `k` alternatives at most. All on the logits' device, or after `fetch` on the
    host."""

    token_ids: torch.Tensor  # (S,) int64, some may be BROKEN
    logprobs: torch.Tensor | None = None  # (W,) float32, of the chosen tokens
    top_ids: torch.Tensor | None = None  # (W, k) int64, best first
    top_logprobs: torch.Tensor | None = None  # (W, k) float32


_Head = tuple[torch.Tensor, torch.Tensor]  # a row's best scores, descending, and their token ids: (R, K) each


@dataclass(frozen=True, slots=True)
class _Draws:
    """Settings of the R rows that are drawn at random, as tensors on the device."""

    row_idx: torch.Tensor | None  # (R,) int64; None: all rows
    choice_hashes: UInt64Array  # (R,) host
    temperature: torch.Tensor  # (R, 1) float32
    top_k: torch.Tensor  # (R, 1) int64; 0: off
    top_p: torch.Tensor  # (R, 1) float64
    log_min_p: torch.Tensor  # (R, 1) float32; -inf: off
    is_filtered: torch.Tensor  # (R, 1) bool
    any_filtered: bool
    all_filtered: bool
    by_top_k: bool  # every filtered row has a top_k
    max_top_k: int
    any_top_p: bool

    def at(self, idx: torch.Tensor | slice) -> _Draws:
        """What the filters need of some of the rows."""
        names = ("top_k", "top_p", "log_min_p", "is_filtered")
        return replace(self, **{name: getattr(self, name)[idx] for name in names})


def sample(logits: torch.Tensor, rows: list[SampleRow]) -> Sampled:
    """logits (S, V) float32 are overwritten: NaN counts as minus infinity."""
    torch.nan_to_num_(logits, nan=-torch.inf, posinf=1e30, neginf=-torch.inf)
    wants = [i for i, row in enumerate(rows) if row.params.top_logprobs is not None]
    if not wants:
        return Sampled(_choose(logits, rows))

    wanted = _row_index(tuple(wants), logits.device)
    raw = logits.index_select(0, wanted)  # a copy: penalties change `logits`
    log_total = raw.logsumexp(-1, keepdim=True)
    token_ids = _choose(logits, rows)
    chosen = raw.gather(1, token_ids[wanted].clamp_min(0).unsqueeze(1)) - log_total
    out = Sampled(token_ids, logprobs=_sayable(chosen.squeeze(1)))
    k = min(max(rows[i].params.top_logprobs or 0 for i in wants), logits.shape[1])
    if k > 0:
        top, out.top_ids = raw.topk(k, dim=-1)
        out.top_logprobs = _sayable(top - log_total)
    return out


def fetch(sampled: Sampled, stream: Stream) -> Sampled:
    """The same on the host, once a mark of the stream behind this call has been waited for."""
    given = (sampled.token_ids, sampled.logprobs, sampled.top_ids, sampled.top_logprobs)
    token_ids, *optional = (None if x is None else stream.to_host(x) for x in given)
    assert token_ids is not None
    return Sampled(token_ids, *optional)


def to_host(sampled: Sampled, rows: list[SampleRow]) -> list[tuple[int, TokenLogprob | None]]:
    """(token id, logprob where the row wants it) per row, of tensors on the host."""
    token_ids = sampled.token_ids.tolist()  # sync: none, they are on the host
    if sampled.logprobs is None:
        return [(token_id, None) for token_id in token_ids]
    logprobs = iter(sampled.logprobs.tolist())  # sync: as above
    tops: Iterator[tuple[tuple[int, float], ...]] = repeat(())
    if sampled.top_ids is not None and sampled.top_logprobs is not None:
        top_ids, top_logprobs = sampled.top_ids.tolist(), sampled.top_logprobs.tolist()  # sync: as above
        tops = (tuple(zip(*top, strict=True)) for top in zip(top_ids, top_logprobs, strict=True))
    results: list[tuple[int, TokenLogprob | None]] = []
    for token_id, row in zip(token_ids, rows, strict=True):
        k = row.params.top_logprobs
        results.append((token_id, TokenLogprob(token_id, next(logprobs), next(tops)[:k]) if k is not None else None))
    return results


def _choose(logits: torch.Tensor, rows: list[SampleRow]) -> torch.Tensor:
    """`Sampled.token_ids`. Overwrites the logits."""
    if any(row.params.changes_logits for row in rows):
        _change(logits, rows)
    draws = _draws(tuple((row.params, row.choice) for row in rows), logits.device)
    if draws is None:
        token_ids = logits.argmax(-1)
    elif draws.row_idx is None:
        token_ids = _draw(logits.div_(draws.temperature), draws, rows)
    else:
        token_ids = logits.argmax(-1)
        scores = logits.index_select(0, draws.row_idx).div_(draws.temperature)
        drawn = _draw(scores, draws, [row for row in rows if row.params.temperature > 0])
        token_ids.index_copy_(0, draws.row_idx, drawn)
    broken = logits.gather(1, token_ids.unsqueeze(1)).squeeze(1) == -torch.inf
    return token_ids.masked_fill_(broken, BROKEN)


def _draw(scores: torch.Tensor, draws: _Draws, rows: list[SampleRow]) -> torch.Tensor:
    """Filter scores (R, V), logits over temperature, and draw. Returns (R,) int64."""
    keys = to_device(hash_positions(draws.choice_hashes, [row.position for row in rows]), scores.device)
    block_len = max(1, CPU_BLOCK // scores.shape[1]) if scores.device.type == "cpu" else len(rows)
    blocks = [slice(start, start + block_len) for start in range(0, len(rows), block_len)]
    return torch.cat([_draw_block(scores[block], draws.at(block), keys[:, block]) for block in blocks])


def _draw_block(scores: torch.Tensor, draws: _Draws, keys: torch.Tensor) -> torch.Tensor:
    if not draws.any_filtered:
        return _pick(scores, None, keys, None)
    renorm = renorm_for(scores.device.type)
    if renorm is not None:
        kept = kept_tokens(
            scores,
            draws.top_k,
            draws.top_p,
            draws.log_min_p,
            renorm,
            any_top_k=draws.max_top_k > 0,
            any_top_p=draws.any_top_p,
        )
        return _pick(scores.masked_fill_(~kept, -torch.inf), None, keys, None)
    num_head = draws.max_top_k + TIE_SLACK
    least, head = _search(scores, draws, num_head if draws.by_top_k else max(num_head, NUM_HEAD))
    if head is None or not draws.all_filtered:
        return _pick(scores, None, keys, least)
    return _pick(*head, keys, least)


def _search(scores: torch.Tensor, draws: _Draws, num_head: int) -> tuple[torch.Tensor, _Head | None]:
    """Each row's threshold (R, 1), found among its `num_head` best or, where these do not suffice, among more; and the
    head, if it holds all that passes in every row."""
    num_head = min(num_head, scores.shape[1])
    head, head_ids = scores.topk(num_head, dim=-1)
    least, is_exact = _threshold(head, scores, draws)
    if num_head == scores.shape[1]:
        return least, (head, head_ids)
    inexact = (~is_exact).nonzero()[:, 0]  # sync: none on a CPU
    if len(inexact) == 0:
        return least, (head, head_ids)
    least[inexact], _ = _search(scores[inexact], draws.at(inexact), num_head * HEAD_GROWTH)
    return least, None


def _threshold(ranked: torch.Tensor, scores: torch.Tensor, draws: _Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """The least score that passes top_k, then top_p among what is left, then min_p: (R, 1), -inf where no filter is on.

    ranked (R, K) are the best of `scores` (R, V), descending. Second: (R, 1) bool, whether these K sufficed to know.
    """
    best, last = ranked[:, :1], ranked[:, -1:]
    has_top_k = draws.top_k > 0
    kth = ranked.gather(1, (draws.top_k - 1).clamp(0, ranked.shape[1] - 1))
    least = torch.where(has_top_k, kth, -torch.inf)
    weights = torch.where(ranked >= least, (ranked - best).double().exp(), 0.0)
    mass = weights.cumsum(-1)
    total = mass[:, -1:]
    if not draws.by_top_k:
        total = torch.where(has_top_k, total, (scores.logsumexp(-1, keepdim=True) - best).double().exp())
    # A token stays while the mass before it is less than top_p, so the first one always does.
    num_kept = (mass - weights < draws.top_p * total).sum(-1, keepdim=True).clamp_(min=1)
    least = torch.where(draws.top_p < 1, torch.maximum(least, ranked.gather(1, num_kept - 1)), least)
    least = torch.maximum(least, best + draws.log_min_p)
    return least, (torch.where(has_top_k, kth, least) > last) | ~draws.is_filtered


def _pick(
    scores: torch.Tensor, ids: torch.Tensor | None, keys: torch.Tensor, least: torch.Tensor | None
) -> torch.Tensor:
    """Gumbel-argmax over those scores (R, K) that reach `least` (R, 1). `ids` (R, K): their tokens; None: 0, 1, 2..."""
    tokens = ids if ids is not None else torch.arange(scores.shape[1], dtype=torch.int32, device=scores.device)
    noisy = gumbel_noise(keys, tokens).add_(scores)
    if least is not None:
        noisy.masked_fill_(scores < least, -torch.inf)
    best = noisy.argmax(-1)
    return best if ids is None else ids.gather(1, best.unsqueeze(1)).squeeze(1)


_Change = tuple[int, np.ndarray[Any, Any], np.ndarray[Any, Any]]  # row, token ids, a number for each


def _change(logits: torch.Tensor, rows: list[SampleRow]) -> None:
    """In place: the repetition penalty as HF has it, of all tokens; then what OpenAI's API adds, penalties of generated
    tokens alone (https://platform.openai.com/docs/api-reference/chat/create); then no stop before `min_tokens`, and
    nothing that the grammar does not have."""
    repeated: list[_Change] = []
    generated: list[_Change] = []
    biased: list[_Change] = []
    banned: list[_Change] = []
    for i, row in enumerate(rows):
        params = row.params
        if params.needs_history:
            assert row.seen is not None, "a row with penalties brings its tokens"
            if params.repetition_penalty != 1:
                ids = row.seen[row.seen < logits.shape[1]]  # mllama's image token has no logit
                repeated.append((i, ids, np.full(len(ids), params.repetition_penalty)))
            if params.frequency_penalty or params.presence_penalty:
                ids, counts = np.unique(row.seen[row.prompt_len :], return_counts=True)
                generated.append((i, ids, -params.frequency_penalty * counts - params.presence_penalty))
        if params.logit_bias:
            ids, amounts = np.array(params.logit_bias).T
            biased.append((i, ids.astype(np.int64), amounts))
        if row.position - row.prompt_len < params.min_tokens:
            ids = np.array([token_id for token_id in params.stop_token_ids if token_id < logits.shape[1]], np.int64)
            banned.append((i, ids, np.full(len(ids), -np.inf)))
    _apply(_penalised, logits, repeated)
    _apply(torch.add, logits, generated)
    _apply(torch.add, logits, biased)
    _apply(torch.add, logits, banned)
    _follow(logits, [(i, row.matcher) for i, row in enumerate(rows) if row.matcher is not None])


def _follow(logits: torch.Tensor, matchers: list[tuple[int, Matcher]]) -> None:
    """Leaves of these rows' logits the tokens that their grammars have next. On a GPU the masks are made while it still
    computes the logits."""
    if not matchers:
        return
    num_tokens = logits.shape[1]
    masks = np.empty((len(matchers), -(-num_tokens // 32)), np.int32)
    for mask, (_, matcher) in zip(masks, matchers, strict=True):
        matcher.allow(mask)
    which = to_device(torch.tensor([row for row, _ in matchers]), logits.device)
    packed = to_device(torch.from_numpy(masks.view(np.uint8)), logits.device)
    addends = _addends_of_bytes(logits.device).index_select(0, packed.flatten().int())
    logits.index_add_(0, which, addends.view(len(matchers), -1)[:, :num_tokens])


@lru_cache(maxsize=4)
def _addends_of_bytes(device: torch.device) -> torch.Tensor:
    """(256, 8): for the bits of a byte from the lowest on, 0 where it is 1 and minus infinity where it is 0. (Adding
    takes a CPU a tenth of the time of `masked_fill_`.)"""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return to_device(torch.from_numpy(np.where(bits, 0, -np.inf).astype(np.float32)), device)


def _penalised(values: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    return torch.where(values > 0, values / penalty, values * penalty)


def _apply(
    rule: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], logits: torch.Tensor, changes: list[_Change]
) -> None:
    """Each logit becomes rule(logit, number), once however often its token is named."""
    if not changes:
        return
    cells = np.concatenate([row * logits.shape[1] + ids for row, ids, _ in changes])
    numbers = np.concatenate([numbers for _, _, numbers in changes], dtype=np.float32)
    cell, number = (to_device(torch.from_numpy(array), logits.device) for array in (cells, numbers))
    flat = logits.view(-1)
    flat[cell] = rule(flat[cell], number)


@lru_cache(maxsize=16)
def _draws(settings: tuple[tuple[SamplingParams, int], ...], device: torch.device) -> _Draws | None:
    """None if all rows are greedy. `settings`: params and choice of each row."""
    row_idx = tuple(i for i, (params, _) in enumerate(settings) if params.temperature > 0)
    if not row_idx:
        return None
    drawn = [settings[i] for i in row_idx]
    params = [p for p, _ in drawn]
    is_filtered = [p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in params]

    def column(values: list[Any], dtype: torch.dtype) -> torch.Tensor:
        return to_device(torch.tensor(values, dtype=dtype).unsqueeze(1), device)

    return _Draws(
        row_idx=None if len(row_idx) == len(settings) else _row_index(row_idx, device),
        choice_hashes=hash_choices([p.seed for p in params], [choice for _, choice in drawn]),
        temperature=column([p.temperature for p in params], torch.float32),
        top_k=column([p.top_k for p in params], torch.int64),
        top_p=column([p.top_p for p in params], torch.float64),
        log_min_p=column([np.log(p.min_p) if p.min_p > 0 else -np.inf for p in params], torch.float32),
        is_filtered=column(is_filtered, torch.bool),
        any_filtered=any(is_filtered),
        all_filtered=all(is_filtered),
        max_top_k=max(p.top_k for p in params),
        any_top_p=any(p.top_p < 1 for p in params),
        by_top_k=all(p.top_k > 0 for p, filtered in zip(params, is_filtered, strict=True) if filtered),
    )


@lru_cache(maxsize=16)
def _row_index(row_idx: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return to_device(torch.tensor(row_idx, dtype=torch.int64), device)


def _sayable(logprobs: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num_(logprobs, nan=LEAST_LOGPROB, neginf=LEAST_LOGPROB)
