"""The scheduler's limits, and which requests they rule out for ever. Called by the engine and the scheduler."""

from __future__ import annotations

from dataclasses import dataclass

from lightvl.core import Prompt, SamplingParams
from lightvl.errors import BadRequest, ContextLengthExceeded
from lightvl.scheduling.image_store import ImageStore
from lightvl.scheduling.pages import PagePool
from lightvl.scheduling.rows import largest_union


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    page_size: int
    max_running: int
    chunk_tokens: int  # prefill tokens of one step
    context_len: int
    step_budget_s: float  # aim for a step with decode rows; the chunk beside them is shrunk to it
    encode_budget_s: float  # of a step while streams run; several times this without
    max_steps_in_flight: int = 1  # launched and not committed
    mix_rows: bool = True  # False: a step holds chunks or decode rows, in turns


def check_fits(
    limits: SchedulerLimits, pages: PagePool, images: ImageStore, prompt: Prompt, params: SamplingParams
) -> None:
    """Raises BadRequest where a request could never run, even alone. `max_tokens` must end within the context."""
    num_tokens = len(prompt)
    if num_tokens == 0:
        raise BadRequest("the prompt is empty", param="messages")
    if num_tokens + 1 > limits.context_len:
        raise ContextLengthExceeded(
            f"the prompt has {num_tokens} tokens; the context length is {limits.context_len} tokens, "
            "of which at least one is generated",
            param="messages",
        )
    if num_tokens + params.max_tokens > limits.context_len:
        raise ContextLengthExceeded(
            f"the prompt's {num_tokens} tokens and max_tokens {params.max_tokens} are more than "
            f"the context length of {limits.context_len} tokens",
            param="max_tokens",
        )
    room = pages.num_pages * limits.page_size
    if num_tokens > room:
        raise ContextLengthExceeded(
            f"the prompt has {num_tokens} tokens; the K,V memory of this server holds {room}", param="messages"
        )
    if images.paged:
        most, what = largest_union(prompt.images), "the images that one row attends to need {} cross pages"
    else:
        most, what = max((image.size for image in prompt.images), default=0), "an image needs {} feature rows"
    if most > images.capacity:
        raise BadRequest(
            f"{what.format(most)}; this server holds {images.capacity}: send fewer or smaller images", param="messages"
        )
