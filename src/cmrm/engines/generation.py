"""Replies to samples under one condition, steered at dataset level, at sample level, or not:
`generate`, `stream`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from threading import Event

from cmrm.engines.base import Decoding, Engine, Reply
from cmrm.engines.transformers import TransformersEngine
from cmrm.errors import InputError
from cmrm.model.batching import in_batches
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Condition, Request, build_request, choose_donors
from cmrm.prompts.sample import Sample
from cmrm.shift.artifact import ShiftVectors
from cmrm.shift.estimate import SampleLevel
from cmrm.shift.resolve import resolved
from cmrm.steering.intervention import Intervention, shift_intervention
from cmrm.steering.setting import Steering


@dataclass(frozen=True)
class Generation:
    """One reply to a sample."""

    sample_id: str
    """Id of the sample."""
    condition: Condition
    """How it was put to the model."""
    text: str
    """The reply, special tokens removed, white space stripped at both ends."""
    tokens: int
    """Generated tokens, the end-of-turn token included."""
    gate_open: bool | None = None
    """Whether the artifact's gate opened for it; None where no gate decided."""


def generate(
    model: VLM | Engine,
    samples: Sequence[Sample],
    *,
    condition: Condition | str = Condition.ORIGINAL,
    shift: ShiftVectors | SampleLevel | None = None,
    steering: Steering | None = None,
    max_new_tokens: int = 48,
    batch_size: int = 16,
    seed: int = 0,
    on_batch: Callable[[list[Generation]], None] | None = None,
) -> list[Generation]:
    """Greedy replies to `samples` under one condition, in the order given.

    Args:
        model: a VLM, or an engine, which keeps the beginnings of prompts between calls.
        samples: what is asked.
        condition: see `conditions`.
        shift: None leaves the model untouched; an artifact steers as its setting says (`fill` runs
            each request once as text); `SampleLevel()` computes each row's own shift.
        steering: setting; an artifact's recommended one, or the calibrated preset, when None.
        max_new_tokens: length limit of a reply, >= 1.
        batch_size: prompts per batch, >= 1. Prompts are batched by length.
        seed: seed of the noise condition.
        on_batch: called with the replies of each finished batch.

    Raises:
        InputError: an image, caption or option cannot be used. ArtifactError: vectors of another
            model.
        SteeringError: steering cannot be applied.
    """
    engine = _engine(model)
    condition = _condition(condition)
    options = Decoding(max_new_tokens=max_new_tokens)
    _check_shift(engine, shift)
    donors = choose_donors(samples, seed=seed) if condition is Condition.OTHER else None
    order = sorted(range(len(samples)), key=lambda k: len(samples[k].query))
    replies: dict[int, Generation] = {}

    def work(places: list[int]) -> list[Reply]:
        batch = [samples[k] for k in places]
        requests = [build_request(s, condition, seed=seed, donors=donors) for s in batch]
        interventions = _interventions(engine, shift, steering, requests, [s.id for s in batch])
        return engine.answer(requests, interventions, options, batch_size=len(batch))

    for places, batch_replies in in_batches(order, batch_size, work):
        generations = [
            Generation(samples[k].id, condition, reply.text, reply.tokens, reply.gate_open)
            for k, reply in zip(places, batch_replies, strict=True)
        ]
        replies.update(zip(places, generations, strict=True))
        if on_batch is not None:
            on_batch(generations)
    return [replies[k] for k in range(len(samples))]


def stream(
    model: VLM | Engine,
    sample: Sample,
    *,
    shift: ShiftVectors | SampleLevel | None = None,
    steering: Steering | None = None,
    max_new_tokens: int = 256,
    cancel: Event | None = None,
) -> Iterator[str | Generation]:
    """Greedy reply to one sample, piece by piece as it is generated; at the end the whole of it as
    a `Generation`.

    The sample is put to the model as it is: with its image where it has one. Closing the iterator,
    or setting `cancel`, ends the generation. See `generate` for the arguments.

    Raises:
        InputError, ArtifactError, SteeringError: as `generate`, when the first piece is asked for.
    """
    engine = _engine(model)
    condition = Condition.ORIGINAL if sample.image is not None else Condition.QUERY
    _check_shift(engine, shift)
    request = build_request(sample, condition)
    interventions = _interventions(engine, shift, steering, [request], [sample.id])
    options = Decoding(max_new_tokens=max_new_tokens)
    with closing(engine.stream(request, interventions, options, cancel=cancel)) as pieces:
        for piece in pieces:
            if isinstance(piece, Reply):
                yield Generation(sample.id, condition, piece.text, piece.tokens, piece.gate_open)
            else:
                yield piece


def _engine(model: VLM | Engine) -> Engine:
    return model if isinstance(model, Engine) else TransformersEngine(model)


def _condition(condition: Condition | str) -> Condition:
    try:
        return Condition(condition)
    except ValueError:
        raise InputError(
            f"unknown condition {condition!r}; one of {', '.join(Condition)}"
        ) from None


def _check_shift(engine: Engine, shift: ShiftVectors | SampleLevel | None) -> None:
    if isinstance(shift, ShiftVectors):
        engine.accept(shift)


def _interventions(
    engine: Engine,
    shift: ShiftVectors | SampleLevel | None,
    steering: Steering | None,
    requests: Sequence[Request],
    keys: Sequence[str],
) -> list[Intervention]:
    """What is done to the model while it answers one batch."""
    if shift is None or not any(request.all_images for request in requests):
        return []
    if isinstance(shift, ShiftVectors):
        return resolved(shift, steering, partial(engine.text_states, requests))
    return [shift_intervention(engine.sample_shift(requests, shift, keys), steering or Steering())]
