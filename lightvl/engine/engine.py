"""The loop: plan, launch, await the oldest step, commit, and again. Owns the steps in flight and what clients wait for;
knows no HTTP and no torch. Every admitted request ends with exactly one last event, whatever stage broke."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable
from typing import Literal

from lightvl.core import Finish, Prompt, SamplingParams, TokenLogprob
from lightvl.engine.device import Device, DeviceLost, StepResult
from lightvl.engine.generation import ActiveChoice, EngineGeneration
from lightvl.engine.watchdog import Watchdog
from lightvl.errors import BadRequest, LightVLError, Overloaded
from lightvl.metrics import Metrics
from lightvl.prompt.detokenizer import Detokenizer
from lightvl.scheduling.plan import StepOutcome, StepPlan
from lightvl.scheduling.scheduler import Scheduler
from lightvl.scheduling.sequence import Sequence, SequenceState

logger = logging.getLogger(__name__)

MakeDetokenizer = Callable[[SamplingParams], Detokenizer]


class Engine:
    """Submit and abort are called on the loop; `start` runs the machine as a task of its own until `close`."""

    def __init__(
        self,
        scheduler: Scheduler,
        device: Device,
        make_detokenizer: MakeDetokenizer,
        metrics: Metrics,
        watchdog: Watchdog,
    ) -> None:
        self._scheduler = scheduler
        self._device = device
        self._make_detokenizer = make_detokenizer
        self._metrics = metrics
        self._watchdog = watchdog
        metrics.add("images_encoded_total", 0)
        metrics.gauge("num_running", lambda: scheduler.num_running)
        metrics.gauge("num_waiting", lambda: scheduler.num_waiting)
        self._choices: dict[Sequence, ActiveChoice] = {}
        self._in_flight: deque[tuple[StepPlan, asyncio.Future[StepResult]]] = deque()
        self._seq_ids = itertools.count()
        self._work_arrived = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._task: asyncio.Task[None] | None = None

    @property
    def healthy(self) -> bool:
        return self._task is not None and not self._task.done() and not self._watchdog.failed

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        hangs = Overloaded("The device does not answer; the server starts anew.")

        def tell() -> None:
            loop.call_soon_threadsafe(self._fail_all, hangs)

        self._watchdog.on_failure = tell
        self._watchdog.start()
        self._task = asyncio.create_task(self._run(), name="lightvl-engine")

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, and wait until the running ones have ended or the time is up."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            logger.warning("%d choices were still running after %.0f s of draining", len(self._choices), timeout_s)

    async def close(self) -> None:
        self._draining = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._fail_all(Overloaded("The server is shutting down."))
        await asyncio.to_thread(self._device.close)
        self._watchdog.close()

    def submit(self, prompt: Prompt, params: SamplingParams) -> EngineGeneration:
        """Queue `params.n` choices. Raises BadRequest when the prompt can never fit, Overloaded when draining."""
        if self._draining:
            raise Overloaded("The server is shutting down.")
        if not self.healthy:
            raise Overloaded("The engine has failed; see the server's log.")
        self._scheduler.check_fits(prompt, params)
        generation = EngineGeneration(self._abort)
        sequences = [Sequence(next(self._seq_ids), prompt, params, choice) for choice in range(params.n)]
        for sequence in sequences:
            self._choices[sequence] = generation.add(sequence, self._make_detokenizer(params))
        self._scheduler.add(sequences)
        self._idle.clear()
        self._work_arrived.set()
        return generation

    async def _run(self) -> None:
        try:
            while True:
                plan = self._scheduler.plan()
                if plan is not None:
                    self._in_flight.append((plan, self._device.submit(plan)))
                    if len(self._in_flight) == 1:
                        self._watchdog.step_began()
                elif self._end_exhausted():
                    continue  # others may fit now
                elif self._in_flight:
                    await self._complete_oldest()
                elif not self._scheduler.has_work:
                    self._check_idle()
                    self._work_arrived.clear()
                    await self._work_arrived.wait()
                else:
                    raise RuntimeError("the scheduler has work, but neither a plan nor a step in flight")
        except asyncio.CancelledError:
            raise
        except Exception:
            logger.exception("the engine loop broke; all requests are ended")
            self._fail_all(LightVLError("The engine failed."))
            raise

    def _check_idle(self) -> None:
        """A leak is told in the log; the server goes on with what it has left."""
        try:
            self._scheduler.check_idle()
        except AssertionError as error:
            logger.error("a conservation law is broken: %s", error)

    async def _complete_oldest(self) -> None:
        plan, pending = self._in_flight[0]
        try:
            result = await pending
        except asyncio.CancelledError:
            raise
        except DeviceLost as error:
            self._watchdog.condemn(f"the device is lost: {error}")
            await asyncio.Event().wait()  # the watchdog tells the clients, then ends the process
        except Exception as error:
            keys = tuple(work.image.key for work in plan.encodes)
            result = StepResult(StepOutcome(failed=keys, rows_failed=True), rows_error=error)
            result.encode_errors = dict.fromkeys(result.outcome.failed, error)
        self._in_flight.popleft()
        if self._in_flight:
            self._watchdog.step_began()
        else:
            self._watchdog.idle()
        self._scheduler.complete(plan, result.outcome)
        self._fail_broken(plan, result)
        for sequence, token_id, logprob in result.tokens:
            choice = self._choices.get(sequence)  # None: it ended while the step ran; the token is dropped
            if choice is None:
                continue
            if token_id < 0:
                self._fail(sequence, LightVLError("The model's logits were not finite on this request."))
            else:
                self._commit(choice, token_id, logprob)
        self._metrics.add("images_encoded_total", len(result.outcome.encoded))

    def _commit(self, choice: ActiveChoice, token_id: int, logprob: TokenLogprob | None) -> None:
        sequence, params = choice.sequence, choice.sequence.params
        if sequence.matcher is not None and not sequence.matcher.push(token_id):
            self._fail(sequence, BadRequest("The grammar of this request is too complex to follow."))
            return
        self._scheduler.commit_token(sequence, token_id)
        if token_id in params.stop_token_ids:
            choice.emit(choice.detokenizer.flush(), token_id, logprob)
            self._finish(choice, "stop", token_id)
            return
        text = choice.detokenizer.push(token_id)
        is_last = len(sequence.output_ids) >= params.max_tokens
        if is_last:
            text += choice.detokenizer.flush()  # may still complete a stop string
        choice.emit(text, token_id, logprob)
        if choice.detokenizer.matched is not None:
            self._finish(choice, "stop", choice.detokenizer.matched)
        elif is_last:
            self._finish(choice, "length", None)

    def _finish(self, choice: ActiveChoice, reason: Literal["stop", "length"], matched_stop: int | str | None) -> None:
        sequence = choice.sequence
        self._release(sequence)
        choice.end(
            Finish(
                reason=reason,
                matched_stop=matched_stop,
                prompt_tokens=len(sequence.prompt),
                completion_tokens=len(sequence.output_ids),
                cached_tokens=sequence.num_cached,
            )
        )

    def _end_exhausted(self) -> bool:
        """End the sequences that ran alone and found no page to go on; whether there were any."""
        exhausted = self._scheduler.take_exhausted()
        for sequence in exhausted:
            choice = self._choices.get(sequence)
            if choice is not None:
                choice.emit_text(choice.detokenizer.flush())
                self._finish(choice, "length", None)
        return bool(exhausted)

    def _fail_broken(self, plan: StepPlan, result: StepResult) -> None:
        for image_key, error in result.encode_errors.items():
            logger.error("encoding an image failed", exc_info=error)
            for sequence in self._scheduler.sequences_needing(image_key):
                self._fail(sequence, error)
        if result.rows_error is not None:
            logger.error("a step failed; its requests are ended", exc_info=result.rows_error)
            for row in plan.rows:
                for sequence in {row.sequence, *row.samples}:
                    self._fail(sequence, result.rows_error)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        """End the whole request that the sequence belongs to."""
        choice = self._choices.get(sequence)
        if choice is None:
            return
        told = error if isinstance(error, LightVLError) else LightVLError("The model failed on this request.")
        choice.generation.fail(told)

    def _fail_all(self, error: LightVLError) -> None:
        for choice in list(self._choices.values()):
            choice.generation.fail(error)

    def _abort(self, sequence: Sequence) -> None:
        """A generation's way to free one of its sequences at once."""
        if sequence in self._choices:
            self._release(sequence)
            self._work_arrived.set()  # others may fit now

    def _release(self, sequence: Sequence) -> None:
        del self._choices[sequence]
        if sequence.state is not SequenceState.FINISHED:
            self._scheduler.finish(sequence)
        if not self._choices:
            self._idle.set()
