"""The loop: samples under a condition, answered by a defended engine in fixed batches, judged,
compared.

`cmrm demo`, `cmrm diagnose` and the tasks of `cmrm evaluate` all measure with it. Replies are
stored by batch: a run that was killed continues, and computes the very same batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cmrm.defenses import Defense, respond
from cmrm.engines.base import Decoding, Engine, Reply
from cmrm.errors import InputError
from cmrm.judges import Judge, Judgement
from cmrm.judges.base import assessed_all
from cmrm.measure.answers import EXACT, compared
from cmrm.measure.outcomes import Cell, Outcome, kind_of
from cmrm.measure.store import ReplyStore, request_key
from cmrm.prompts.conditions import Condition, Request, build_request, choose_donors
from cmrm.prompts.sample import Sample


@dataclass(frozen=True)
class Ask:
    """One request of a run, about to be answered."""

    request: Request
    """What is asked."""
    key: str
    """Seeds what a defence draws for it."""


def ordered(samples: Sequence[Sample]) -> list[Sample]:
    """Samples in the order of a run: by length, so that little is padded.

    Those with a reference answer come last. Equally long ones are ordered by id, a shorter id
    first, so that numbered samples are counted up.
    """
    return sorted(samples, key=lambda s: (s.answer is not None, len(s.query), len(s.id), s.id))


def asks_of(samples: Sequence[Sample], condition: Condition, *, seed: int) -> list[Ask]:
    """Requests of `samples` under a condition, in the order given; seeded by the samples' ids."""
    batches = ask_batches(samples, condition, seed=seed, batch_size=max(1, len(samples)))
    return [ask for batch in batches for ask in batch]


def ask_batches(
    samples: Sequence[Sample], condition: Condition, *, seed: int, batch_size: int
) -> Iterator[list[Ask]]:
    """The requests of `asks_of` in consecutive batches; images are opened for one batch at a time.

    Raises:
        InputError: `batch_size` is below 1, or a sample cannot be put under the condition.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it is at least 1")
    donors = choose_donors(samples, seed=seed) if condition is Condition.OTHER else None
    for start in range(0, len(samples), batch_size):
        yield [
            Ask(build_request(sample, condition, seed=seed, donors=donors), sample.id)
            for sample in samples[start : start + batch_size]
        ]


def batch_id(asks: Sequence[Ask]) -> str:
    """Hex sha256 over what a batch asks, in its order; it depends on no model and no defence."""
    contents = "".join(request_key({}, ask.request, ask.key) for ask in asks)
    return hashlib.sha256(contents.encode()).hexdigest()


class Answering:
    """A defended engine that answers batches, and remembers greedy replies in a store.

    A stored reply is bound to the engine's context (model identity, dtype, versions, generation
    settings), to the defence's settings and fitted tensors, to the decoding, and to its batch,
    whose padding it shares.
    """

    def __init__(
        self, engine: Engine, defense: Defense, options: Decoding, store: ReplyStore | None = None
    ) -> None:
        self.engine = engine
        self.defense = defense
        self.options = options
        self.store = store
        self._context: dict[str, Any] | None = None

    @property
    def context(self) -> dict[str, Any]:
        """What every reply depends on, the request, its decoding and its batch aside."""
        if self._context is None:
            self._context = {
                **self.engine.context(), "defense": [part.name for part in self.defense.parts],
                "settings": self.defense.settings, "fitted": self.defense.fingerprint(),
            }  # fmt: skip
        return self._context

    def key(self, ask: Ask, options: Decoding, batch: str) -> str:
        """The store's key of one reply in the batch whose `batch_id` is `batch`."""
        context = {**self.context, "options": options.to_json(), "batch": batch}
        return request_key(context, ask.request, ask.key)

    def stored(self, ask: Ask, options: Decoding, batch: str) -> Reply | None:
        """The stored reply to one request of a batch; None where there is none."""
        if self.store is None or not options.greedy:
            return None
        return self.store.get(self.key(ask, options, batch))

    def batch(
        self, asks: Sequence[Ask], options: Decoding | None = None, *, batch: str | None = None
    ) -> list[Reply]:
        """Replies to one batch: those of the store where it has them all, computed and stored else.

        Args:
            asks: the requests.
            options: decoding; that of the whole run when None.
            batch: identity of the batch that the replies are stored under; `batch_id(asks)` when
                None, and an empty text for replies that any batch may use.

        Raises:
            Whatever the engine and the defence raise.
        """
        options = options or self.options
        store = self.store if options.greedy else None
        batch = batch_id(asks) if batch is None and store is not None else batch or ""
        if store is not None:
            stored = [self.stored(ask, options, batch) for ask in asks]
            if all(reply is not None for reply in stored):
                return [reply for reply in stored if reply is not None]
        replies = respond(
            self.engine, self.defense, [ask.request for ask in asks], options,
            keys=[ask.key for ask in asks],
        )  # fmt: skip
        if store is not None:
            keys = [self.key(ask, options, batch) for ask in asks]
            store.put(dict(zip(keys, replies, strict=True)))
        return replies

    def all(
        self,
        asks: Sequence[Ask],
        *,
        batch_size: int,
        on_batch: Callable[[int], None] = lambda n: None,
    ) -> list[Reply]:
        """Replies to many requests, in the order given, in consecutive batches.

        Raises:
            InputError: `batch_size` is below 1. Whatever the engine and the defence raise.
        """
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; it is at least 1")
        replies: list[Reply] = []
        for at in range(0, len(asks), batch_size):
            batch = asks[at : at + batch_size]
            replies += self.batch(batch)
            on_batch(len(batch))
        return replies


JUDGED = ("harmful", "benign")
"""Kinds of samples whose replies are judged."""


def outcomes_of(
    samples: Sequence[Sample],
    replies: Sequence[str],
    judges: Mapping[str, Judge],
    images: Sequence[Sequence[Any]] = (),
) -> list[Outcome]:
    """Replies with the verdicts of all judges; only harmful and benign requests are judged.

    `images` (PIL) of each sample, as the model saw them, go to judges that see images.
    """
    judged = [k for k, sample in enumerate(samples) if kind_of(sample) in JUDGED]
    pairs = [(samples[k].query, replies[k]) for k in judged]
    shown = [images[k] for k in judged] if images else ()
    judgements: dict[int, dict[str, Judgement]] = {k: {} for k in range(len(samples))}
    for name, judge in judges.items():
        for k, judgement in zip(judged, assessed_all(judge, pairs, shown), strict=True):
            judgements[k][name] = judgement
    return [
        _outcome(sample, reply, judgements[k])
        for k, (sample, reply) in enumerate(zip(samples, replies, strict=True))
    ]


def _outcome(sample: Sample, reply: str, judgements: Mapping[str, Judgement]) -> Outcome:
    """One reply, its judgements, and its comparison with a reference answer."""
    kind = kind_of(sample)
    reasons = {name: j.reason for name, j in judgements.items() if j.reason and not j.failed}
    failed = {name: j.reason for name, j in judgements.items() if j.reason and j.failed}
    scores = (
        {EXACT: compared(reply, sample.answer or "", sample.match)} if kind == "utility" else {}
    )
    return Outcome(
        sample.id,
        kind,
        sample.category or "",
        sample.query,
        reply,
        {name: judgement.verdict.value for name, judgement in judgements.items()},
        reasons,
        failed,
        scores,
        {name: pair for name, j in judgements.items() if (pair := j.probabilities) is not None},
    )


def measure_cell(
    answering: Answering,
    samples: Sequence[Sample],
    judges: Mapping[str, Judge],
    *,
    name: str,
    condition: Condition | str = Condition.ORIGINAL,
    harm: str | None = None,
    batch_size: int = 16,
    seed: int = 0,
    on_batch: Callable[[int], None] = lambda n: None,
) -> Cell:
    """Replies of a defended engine to a set under one condition, judged.

    Args:
        answering: engine, defence, decoding, store.
        samples: the set.
        judges: by name.
        name: of the set, for outputs.
        condition: how samples are put to the model.
        harm: where the set's harm is.
        batch_size: requests a batch.
        seed: seed of noise and donors.
        on_batch: called after each batch with its number of requests.

    Raises:
        InputError: a sample cannot be put under the condition. Whatever engine and defence raise.
    """
    condition = Condition(condition)
    run = ordered(samples)
    cell = Cell(
        name, condition.value, answering.defense.name, len(samples),
        settings=answering.defense.settings, harm=harm,
    )  # fmt: skip
    place = 0
    for asks in ask_batches(run, condition, seed=seed, batch_size=batch_size):
        batch = run[place : place + len(asks)]
        replies = [reply.text for reply in answering.batch(asks)]
        images = [ask.request.images for ask in asks]
        for outcome in outcomes_of(batch, replies, judges, images):
            cell.outcomes[outcome.sample_id] = outcome
        place += len(asks)
        on_batch(len(asks))
    return cell
