"""Batched generation on a VLM, with or without steering, dataset level or sample level."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import Thread
from typing import Any

import torch

from cmrm.shift.artifact import ShiftVectors
from cmrm.model.batching import in_batches
from cmrm.prompts.conditions import Condition, Request, build_request, choose_donors
from cmrm.errors import InputError
from cmrm.model.vlm import VLM, encode
from cmrm.shift.prefix import shared_pair
from cmrm.prompts.sample import Sample
from cmrm.shift.estimate import checked_corruption
from cmrm.steering.hooks import Steering, steer


@dataclass(frozen=True)
class SampleLevel:
    """Sample-level CMRM: each row is steered by its own v = h_t - h_c, from two extra forward passes."""

    corruption: Condition = Condition.BLANK
    """What stands for the image in h_c; every corruption but `other`."""
    seed: int = 0
    """Seed of the noise."""

    def __post_init__(self) -> None:
        if checked_corruption(self.corruption) is Condition.OTHER:
            raise InputError(
                "the sample level has one sample at hand, none to lend it an image; choose another corruption"
            )


@dataclass(frozen=True)
class Generation:
    """One reply."""

    sample_id: str
    """Id of the sample."""
    condition: Condition
    """How it was put to the model."""
    text: str
    """The reply, special tokens removed, white space stripped at both ends."""
    tokens: int
    """Generated tokens, the end-of-turn token included."""


def generate(
    vlm: VLM,
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
        vlm: the model.
        samples: what is asked.
        condition: see `conditions`.
        shift: None leaves the model untouched; vectors steer at dataset level; `SampleLevel()` computes each row's own.
        steering: setting; an artifact's recommended one, or the calibrated preset, when None.
        max_new_tokens: length limit of a reply, >= 1.
        batch_size: prompts per batch, >= 1. Prompts are batched by length, which changes nothing but speed.
        seed: seed of the noise condition.
        on_batch: told the replies of each finished batch.

    Raises:
        InputError: an image, caption or option cannot be used. ArtifactError: vectors of another model.
    """
    condition = Condition(condition)
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; it is at least 1")
    donors = choose_donors(samples, seed=seed) if condition is Condition.OTHER else None
    order = sorted(range(len(samples)), key=lambda k: len(samples[k].query))
    replies: dict[int, Generation] = {}

    def work(places: list[int]) -> tuple[list[str], list[int]]:
        chunk = [samples[k] for k in places]
        requests = [build_request(s, condition, seed=seed, donors=donors) for s in chunk]
        return _one_batch(vlm, chunk, requests, shift, steering, max_new_tokens)

    for places, (texts, counts) in in_batches(order, batch_size, work):
        done = [
            Generation(samples[k].id, condition, text, count)
            for k, text, count in zip(places, texts, counts, strict=True)
        ]
        replies.update(zip(places, done, strict=True))
        if on_batch is not None:
            on_batch(done)
    return [replies[k] for k in range(len(samples))]


def stream(
    vlm: VLM,
    sample: Sample,
    *,
    shift: ShiftVectors | SampleLevel | None = None,
    steering: Steering | None = None,
    max_new_tokens: int = 256,
) -> Iterator[str | Generation]:
    """Greedy reply to one sample, piece by piece as it is generated; at the end the whole of it as a `Generation`.

    The sample is put to the model as it is: with its image where it has one. See `generate` for the arguments.

    Raises:
        InputError: as `generate`. Whatever the model raises while generating is raised here.
    """
    from transformers import TextIteratorStreamer

    condition = Condition.ORIGINAL if sample.image is not None else Condition.QUERY
    streamer = TextIteratorStreamer(vlm.tokenizer, skip_prompt=True, skip_special_tokens=True)
    failures: list[BaseException] = []
    done: list[tuple[list[str], list[int]]] = []

    def work() -> None:
        try:
            requests = [build_request(sample, condition)]
            done.append(_one_batch(vlm, [sample], requests, shift, steering, max_new_tokens, streamer=streamer))
        except BaseException as error:
            failures.append(error)
        finally:
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    for piece in streamer:
        if piece:
            yield piece
    thread.join()
    if failures:
        raise failures[0]
    texts, counts = done[0]
    yield Generation(sample.id, condition, texts[0], counts[0])


def _one_batch(
    vlm: VLM,
    samples: list[Sample],
    requests: list[Request],
    shift: ShiftVectors | SampleLevel | None,
    steering: Steering | None,
    max_new_tokens: int,
    streamer: Any = None,
) -> tuple[list[str], list[int]]:
    context: AbstractContextManager[None] = nullcontext()
    if isinstance(shift, SampleLevel):
        if any(r.all_images for r in requests):
            with torch.inference_mode():
                rows = sample_vectors(vlm, requests, shift, keys=[s.id for s in samples])
            context = steer(vlm, rows, steering)
    elif shift is not None:
        context = steer(vlm, shift, steering)
    with context:
        return complete(vlm, requests, max_new_tokens=max_new_tokens, streamer=streamer)


@torch.inference_mode()
def complete(
    vlm: VLM, requests: Sequence[Request], *, max_new_tokens: int, streamer: Any = None, **options: Any
) -> tuple[list[str], list[int]]:
    """One batch of conversations: replies, and generated tokens of each. Greedy unless `options` of `generate` say otherwise.

    Special tokens are removed, and white space at both ends.
    """
    inputs = encode(vlm, requests)
    out = vlm.model.generate(
        **inputs, max_new_tokens=max_new_tokens, pad_token_id=vlm.tokenizer.pad_token_id, streamer=streamer,
        **({"do_sample": False} | options),
    )  # fmt: skip
    new = out[:, inputs["input_ids"].shape[1] :]
    texts = [str(t).strip() for t in vlm.tokenizer.batch_decode(new, skip_special_tokens=True)]
    ends = vlm.model.generation_config.eos_token_id
    stops = torch.tensor(ends if isinstance(ends, list) else [ends] if ends is not None else [], device=new.device)
    stopped = torch.isin(new, stops)
    counts = torch.where(stopped.any(1), stopped.int().argmax(1) + 1, new.shape[1])
    return texts, [int(c) for c in counts]


def sample_vectors(
    vlm: VLM, requests: Sequence[Request], level: SampleLevel, *, keys: Sequence[str] | None = None
) -> torch.Tensor:
    """Sample-level vectors of one batch: float32 [B, L, d], row i is h_t - h_c of `requests[i]`; zero without an image.

    `keys` seed the corruption of each row's images (default: its text). The system prompt and a constant corrupted image are run once for all
    calls (`prefix.shared_pair`).
    """
    found = torch.zeros(len(requests), vlm.n_layers, vlm.hidden_size)
    rows = [k for k, request in enumerate(requests) if request.all_images]
    if rows:
        text = [requests[k].without_images() for k in rows]
        corrupted = [
            requests[k].corrupted(level.corruption, seed=level.seed, key=keys[k] if keys else requests[k].text)
            for k in rows
        ]
        h_t, h_c = shared_pair(vlm, level.corruption.value).states(text, corrupted)
        found[rows] = h_t - h_c
    return found
