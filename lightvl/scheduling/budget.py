"""PrefillBudget: how many prompt tokens fit into a step beside the running streams.

Owns an estimate of what a prefill token costs on this machine, learned from completed steps; called by the scheduler.
It knows token counts and seconds only.

Model: a chunk of P tokens after `start` tokens of context takes `c0 * P + c1 * A` seconds, where A is the number of
attended pairs. c0 and c1 are a least-squares fit over recent steps (older ones fade), so that chunks shrink as the
context grows. The rest of a mixed step is what a step of decode rows takes, a moving average of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FADE = 0.9  # weight of the past when a new step is taken in
MIN_CONDITION = 1e-3  # below this the two costs cannot be told apart: all is put on c0


def attended_pairs(start: int, num_tokens: int) -> float:
    return num_tokens * (start + (num_tokens + 1) / 2)


@dataclass(slots=True)
class PrefillBudget:
    decode_s: float = 0.0  # a step of decode rows alone
    num_decodes: int = 0  # most rows that a step had which `decode_s` was learned from
    token_s: float = 0.0  # c0
    pair_s: float = 0.0  # c1
    _pp: float = 0.0
    _pa: float = 0.0
    _aa: float = 0.0
    _py: float = 0.0
    _ay: float = 0.0

    @property
    def is_known(self) -> bool:
        return self._pp > 0.0

    def knows_decodes(self, num_decodes: int) -> bool:
        """Whether `decode_s` tells something about a step of so many rows."""
        return num_decodes <= 2 * self.num_decodes

    def seconds(self, start: int, num_tokens: int) -> float:
        return self.token_s * num_tokens + self.pair_s * attended_pairs(start, num_tokens)

    def tokens_within(self, seconds: float, start: int) -> int:
        """Largest chunk after `start` tokens that is expected to take at most `seconds`."""
        if seconds <= 0.0:
            return 0
        linear = self.token_s + self.pair_s * (start + 0.5)
        quadratic = self.pair_s / 2
        if quadratic > 0.0:
            # The smaller-error form of the positive root of quadratic * P^2 + linear * P = seconds.
            return int(2 * seconds / (linear + math.sqrt(linear * linear + 4 * quadratic * seconds)))
        return int(seconds / linear) if linear > 0.0 else 1 << 30

    def record(self, num_decodes: int, num_tokens: int, num_pairs: float, rows_s: float) -> None:
        """A completed step: its decode rows, and the tokens and attended pairs of its chunks."""
        if not num_tokens:
            if not num_decodes:
                return
            fade = FADE if self.decode_s and self.knows_decodes(num_decodes) else 0.0
            self.decode_s = fade * self.decode_s + (1 - fade) * rows_s
            self.num_decodes = max(self.num_decodes, num_decodes)
            return
        if rows_s <= 0.0:
            return
        y = max(rows_s - (self.decode_s if num_decodes else 0.0), 0.1 * rows_s)
        p, a = float(num_tokens), num_pairs
        self._pp = FADE * self._pp + p * p
        self._pa = FADE * self._pa + p * a
        self._aa = FADE * self._aa + a * a
        self._py = FADE * self._py + p * y
        self._ay = FADE * self._ay + a * y
        self._fit()

    def _fit(self) -> None:
        self.token_s, self.pair_s = self._py / self._pp, 0.0
        det = self._pp * self._aa - self._pa * self._pa
        if det <= MIN_CONDITION * self._pp * self._aa:
            return
        token_s = (self._py * self._aa - self._ay * self._pa) / det
        pair_s = (self._pp * self._ay - self._pa * self._py) / det
        if token_s < 0.0:
            self.token_s, self.pair_s = 0.0, self._ay / self._aa
        elif pair_s > 0.0:
            self.token_s, self.pair_s = token_s, pair_s
