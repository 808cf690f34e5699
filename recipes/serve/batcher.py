"""Continuous batching: one thread owns the model; requests join the running batch between two decoding steps."""

import logging
import threading
import time
from collections import deque

import torch

from ..load import is_full
from .batch import Ended, Failed, Row, RowBatch


logger = logging.getLogger("lavin.serve")

PREFILL_TOKENS = 8192  # of one prefill, padding included
CALM_STEPS = 500  # without running out of memory, after which twice as much is tried again
CLOSED = "The server is shutting down."


class Batcher:
    """
    Answers rows. `submit` and `cancel` may be called by any thread; the model belongs to the worker alone (its routing
    is shared state: one model serves one thread).

    At each step the waiting rows that fit are prefilled together and join the running ones; then every running row
    gets one token, and rows that are done leave. Rows that the memory does not hold together begin again from where
    they are, fewer at once.

    Args:
        model (`LavinForConditionalGeneration`): In eval mode, on its device. Nothing may change it from here on.
        eos_token_ids (`set[int]`): Tokens that end an answer.
        max_batch_size (`int`): Rows decoded together.
        max_batch_tokens (`int`): Rows times their longest possible length (prompt and answer): bounds the cache. A row
            that is longer by itself runs alone.
    """

    def __init__(self, model, eos_token_ids: set[int], max_batch_size: int = 32, max_batch_tokens: int = 32_768):
        self.model = model
        self.eos_token_ids = eos_token_ids
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens
        self.fitting_tokens = max_batch_tokens  # fewer for a while where memory ran out
        self.calm = 0  # steps since then
        self.waiting: deque[Row] = deque()
        self.batch: RowBatch | None = None
        self.starting: list[Row] = []  # taken from `waiting`, not yet in `batch`
        self.changed = threading.Condition()
        self.closed = False
        self.stop_at = None  # time.monotonic() at which running rows are given up
        self.thread = None
        self.steps = self.generated = self.failures = 0

    @property
    def running(self) -> int:
        batch = self.batch
        return (len(batch.rows) if batch else 0) + len(self.starting)

    @property
    def healthy(self) -> bool:
        """Whether the worker lives and one of its last three steps succeeded."""
        return self.thread is not None and self.thread.is_alive() and self.failures < 3

    def start(self):
        self.thread = threading.Thread(target=self._work, name="lavin-batcher", daemon=True)
        self.thread.start()

    def submit(self, row: Row):
        with self.changed:
            if not self.closed and self.stop_at is None:
                self.waiting.append(row)
                self.changed.notify()
                return
        self._tell(row, Failed(503, CLOSED))

    def cancel(self, row: Row):
        """Nobody waits for this row any more. It leaves before the next step, and is told nothing."""
        row.cancelled = True
        with self.changed:
            if row in self.waiting:
                self.waiting.remove(row)

    def stop(self, grace: float):
        """Gives running and waiting rows so many seconds to end. May be called by a signal handler: takes no lock."""
        self.stop_at = time.monotonic() + grace

    def close(self, timeout: float = 5.0):
        """Ends every row with an error, then the worker."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        if self.thread is not None:
            self.thread.join(timeout)

    def _work(self):
        with torch.inference_mode(), self.model.keep_routing():
            while not self.closed:
                self._wait_and_step()
        self._fail(self._all(), Failed(503, CLOSED))

    def _wait_and_step(self):
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.batch or self.closed)
            if self.stop_at is not None and time.monotonic() > self.stop_at:
                self.closed = True
        if self.closed:
            return
        try:
            self.step()
        except Exception as error:  # not of the model: of this file. The server lives on all the same.
            self._fail(self._all(), self._reason(error))

    def _all(self) -> list[Row]:
        """Takes every row out of the batcher."""
        with self.changed:
            rows = [*(self.batch.rows if self.batch else []), *self.starting, *self.waiting]
            self.batch, self.starting = None, []
            self.waiting.clear()
        return rows

    @torch.inference_mode()
    def step(self):
        """One decoding step, with everything that may happen before it. Called by the worker (or by a test)."""
        if self.batch is not None:
            self._keep([i for i, row in enumerate(self.batch.rows) if not row.cancelled])
        for group in self._admitted():
            self._begin(group)
        if self.batch is not None:
            failed = None
            try:
                self.batch.step()
                going_on = self._deliver(self.batch)
            except Exception as error:  # the cache may hold half a step
                failed, full = self._reason(error), is_full(error)
            if failed is not None:  # here, so that the error's frames do not hold the step's memory
                rows, self.batch = self.batch.rows, None
                if full and len(rows) > 1:
                    self._again(rows, len(rows) * max(row.final_length for row in rows) // 2)
                else:
                    self._fail(rows, failed)
                return
            self._keep(going_on)
            self.steps += 1
            self.calm += 1
            self.failures = 0
            if self.calm >= CALM_STEPS and self.fitting_tokens < self.max_batch_tokens:
                self._try(2 * self.fitting_tokens)

    def _keep(self, kept: list[int]):
        self.batch.keep(kept)
        if not self.batch.rows:
            self.batch = None

    def _admitted(self) -> list[list[Row]]:
        """Takes the waiting rows that fit, in their order, grouped so that a prefill is mostly tokens, not padding."""
        lengths = [row.final_length for row in self.batch.rows] if self.batch else []
        with self.changed:
            while self.waiting and len(lengths) < self.max_batch_size:
                length = self.waiting[0].final_length
                if lengths and (len(lengths) + 1) * max(*lengths, length) > self.fitting_tokens:
                    break
                lengths.append(length)
                self.starting.append(self.waiting.popleft())
        groups = []
        for row in sorted(self.starting, key=lambda row: -len(row.input_ids)):
            longest = len(groups[-1][0].input_ids) if groups else 0
            if groups and 2 * len(row.input_ids) >= longest and longest * (len(groups[-1]) + 1) <= PREFILL_TOKENS:
                groups[-1].append(row)
            else:
                groups.append([row])
        return groups

    def _begin(self, rows: list[Row]):
        """Prefills rows and joins them to the running ones."""
        failed, full, batch = None, False, None
        try:
            batch = RowBatch(self.model, rows)
        except Exception as error:
            failed, full = self._reason(error), is_full(error)
        if failed is not None and len(rows) > 1:  # one row's fault must not end the others; half the memory helps
            logger.warning("%d rows could not be prefilled together: each is tried alone", len(rows))
            self._release()
            for row in rows:
                self._begin([row])
            return
        if failed is None:
            try:
                batch.keep(self._deliver(batch))
                if batch.rows and self.batch is not None:
                    self.batch.join(batch)
                elif batch.rows:
                    self.batch = batch
                self.failures = 0
            except Exception as error:
                failed, full = self._reason(error), is_full(error)
        self.starting = [row for row in self.starting if row not in rows]
        batch, left = None, [row for row in rows if not row.ended]
        if failed is not None and full and (self.batch is not None or len(left) > 1):
            running = self.batch.rows if self.batch is not None else []
            # What runs fits, and with these rows it does not: half of that, but never less than what runs.
            held, tried = (len(r) * max((row.final_length for row in r), default=0) for r in (running, running + left))
            self._again(left, max(held, tried // 2))
        elif failed is not None:
            if full:  # alone: what ran beside it was not the cause
                self._try(self.max_batch_tokens)
            self._fail(left, failed)

    def _deliver(self, batch: RowBatch) -> list[int]:
        """Hands each row its new token; returns the rows that go on, by their places."""
        going_on = []
        for i, (row, token) in enumerate(zip(batch.rows, batch.choose(), strict=True)):
            if token is None:
                self._tell(row, Failed(500, "The model's scores are not finite (NaN or infinity)."))
                continue
            self.generated += 1
            row.tokens.append(token)
            piece = "" if token in self.eos_token_ids else row.text.push(token)
            if piece:
                self._tell(row, piece)
            if token in self.eos_token_ids or row.text.stopped:
                self._end(row, "stop")
            elif len(row.tokens) >= row.max_new_tokens:
                self._end(row, "length")
            else:
                going_on.append(i)
        return going_on

    def _end(self, row: Row, reason: str):
        piece = row.text.end()
        # A stop string may come to light only now, in what was held back as half a character.
        reason = "stop" if row.text.stopped else reason
        if piece:
            self._tell(row, piece)
        self._tell(row, Ended(reason))

    def _tell(self, row: Row, event):
        if row.cancelled or row.ended:
            return
        row.ended = not isinstance(event, str)
        try:
            row.emit(event)
        except Exception:  # its listener is gone
            row.cancelled = True

    def _again(self, rows: list[Row], tokens: int):
        """Rows that the memory does not hold beside the others wait for their turn; for a while less is tried."""
        self._try(max(1, min(tokens, self.fitting_tokens)))
        logger.warning("out of memory: for the next %d steps at most %d tokens", CALM_STEPS, self.fitting_tokens)
        with self.changed:
            self.waiting.extendleft(reversed([row for row in rows if not row.cancelled]))
        self._release()

    def _try(self, tokens: int):
        """Sets how many tokens a batch may have from here on."""
        self.fitting_tokens, self.calm = min(tokens, self.max_batch_tokens), 0

    def _fail(self, rows: list[Row], failed: Failed):
        for row in rows:
            self._tell(row, failed)
        self._release()

    def _reason(self, error: Exception) -> Failed:
        """Counts and logs a failure; the first line of it is for the client."""
        self.failures += 1
        logger.error("a step failed", exc_info=error)
        first = (str(error).splitlines() or [""])[0][:300]
        if is_full(error):
            return Failed(500, f"The server ran out of memory in this request's batch: {first}")
        return Failed(500, f"The model failed on this request's batch: {type(error).__name__}: {first}")

    def _release(self):
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
