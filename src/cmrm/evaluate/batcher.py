"""Requests of many callers, answered in batches on one thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from cmrm.engines.base import Decoding, Reply
from cmrm.measure.loop import Answering, Ask

WINDOW = 0.2
"""Seconds without a new request after which a batch is answered that is not full."""
PATIENCE = 30.0
"""Seconds without a new request after which a batch is answered although an announced request is
missing."""


@dataclass(frozen=True)
class Place:
    """Where a request belongs in a batch that its task has announced."""

    batch: str
    """`measure.loop.batch_id` of the whole batch."""
    size: int
    """Requests of the batch."""
    index: int
    """Place of the request in the batch, from 0."""


@dataclass
class Job:
    """One request that waits for its reply."""

    ask: Ask
    """The request, and the seed of what a defence draws for it."""
    options: Decoding
    """How it is decoded."""
    place: Place | None = None
    """Its place in an announced batch; None where no batch was announced."""
    future: Future[Reply] = field(default_factory=Future)
    """Done when the reply is there."""

    @property
    def batch(self) -> str:
        """Identity of the batch that the reply is stored under; empty for any batch."""
        return self.place.batch if self.place else ""

    @property
    def group(self) -> tuple[Decoding, str]:
        """Jobs of one group may share a batch."""
        return self.options, self.batch

    @property
    def order(self) -> tuple[int, int, str]:
        """Key that sorts a batch: the same rows stand in the same order, whoever came first."""
        return self.place.index if self.place else 0, len(self.ask.request.text), self.ask.key


class Batcher:
    """Collects jobs from many callers, and answers them in batches on a thread of its own.

    A batch that its task has announced is answered when all its requests are there; others when
    `size` requests wait, or none has come for a while.
    """

    def __init__(self, answering: Answering, size: int) -> None:
        self.answering = answering
        self.size = size
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._last = time.monotonic()
        self._guard = threading.Lock()
        self._serving = False

    def ask(self, job: Job) -> None:
        """Hand in a job; its future is done at once where the store has the reply."""
        stored = self.answering.stored(job.ask, job.options, job.batch)
        if stored is not None:
            job.future.set_result(stored)
            return
        with self._guard:
            self._jobs.put(job)
            if not self._serving:
                threading.Thread(target=self._serve, daemon=True).start()
                self._serving = True

    def close(self) -> None:
        """Answer what waits, then end the thread; a later job starts another one."""
        with self._guard:
            if self._serving:
                self._jobs.put(None)
                self._serving = False

    def _serve(self) -> None:
        waiting: dict[tuple[Decoding, str], list[Job]] = {}
        while True:
            try:
                job = self._jobs.get(timeout=WINDOW if waiting else None)
            except queue.Empty:
                self._flush(waiting)
                continue
            if job is None:
                for jobs in waiting.values():
                    self._answer(jobs)
                return
            jobs = waiting.setdefault(job.group, [])
            jobs.append(job)
            if len(jobs) >= (job.place.size if job.place else self.size):
                self._answer(waiting.pop(job.group))
            self._last = time.monotonic()

    def _flush(self, waiting: dict[tuple[Decoding, str], list[Job]]) -> None:
        """Answer one batch that is not full: an announced one after `PATIENCE` alone."""
        for group, jobs in waiting.items():
            if jobs[0].place is None or time.monotonic() - self._last > PATIENCE:
                self._answer(waiting.pop(group))
                return

    def _answer(self, jobs: list[Job]) -> None:
        live = [job for job in jobs if job.future.set_running_or_notify_cancel()]
        live.sort(key=lambda job: job.order)
        for at in range(0, len(live), self.size):
            part = live[at : at + self.size]
            try:
                replies = self._replies(part)
            except Exception as error:  # these requests fail with it, and the next are answered
                for job in part:
                    job.future.set_exception(error)
                continue
            for job, reply in zip(part, replies, strict=True):
                job.future.set_result(reply)

    def _replies(self, jobs: Sequence[Job]) -> list[Reply]:
        asks = [job.ask for job in jobs]
        return self.answering.batch(asks, jobs[0].options, batch=jobs[0].batch)
