"""Batched generation on a VLM, with or without steering, dataset level or sample level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from cmrm.artifact import ShiftVectors
from cmrm.capture import capture_inputs
from cmrm.conditions import Condition, build_request
from cmrm.errors import InputError
from cmrm.models import VLM, encode
from cmrm.samples import Sample
from cmrm.shift import checked_corruption
from cmrm.steering import Steering, steer


@dataclass(frozen=True)
class SampleLevel:
    """Sample-level CMRM: each row is steered by its own v = h_t - h_c, from two extra forward passes."""

    corruption: Condition = Condition.BLANK
    """What stands for the image in h_c: `blank` or `noise`."""
    seed: int = 0
    """Seed of the noise."""

    def __post_init__(self) -> None:
        checked_corruption(self.corruption)


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
    if max_new_tokens < 1 or batch_size < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}, batch_size {batch_size}; both are at least 1")
    order = sorted(range(len(samples)), key=lambda k: len(samples[k].query))
    replies: dict[int, Generation] = {}
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        chunk = [samples[k] for k in places]
        texts, counts = _one_batch(vlm, chunk, condition, shift, steering, max_new_tokens, seed)
        done = [
            Generation(sample.id, condition, text, count)
            for sample, text, count in zip(chunk, texts, counts, strict=True)
        ]
        replies.update(zip(places, done, strict=True))
        if on_batch is not None:
            on_batch(done)
    return [replies[k] for k in range(len(samples))]


@torch.inference_mode()
def _one_batch(
    vlm: VLM,
    samples: list[Sample],
    condition: Condition,
    shift: ShiftVectors | SampleLevel | None,
    steering: Steering | None,
    max_new_tokens: int,
    seed: int,
) -> tuple[list[str], list[int]]:
    inputs = encode(vlm, [build_request(s, condition, seed=seed) for s in samples])
    if isinstance(shift, SampleLevel):
        rows = sample_vectors(vlm, samples, shift) if condition.has_image else None
        context = steer(vlm, rows, steering) if rows is not None else nullcontext()
    elif shift is not None:
        context = steer(vlm, shift, steering)
    else:
        context = nullcontext()
    with context:
        out = vlm.model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=vlm.tokenizer.pad_token_id
        )
    new = out[:, inputs["input_ids"].shape[1] :]
    texts = [str(t).strip() for t in vlm.tokenizer.batch_decode(new, skip_special_tokens=True)]
    ends = vlm.model.generation_config.eos_token_id
    stops = torch.tensor(ends if isinstance(ends, list) else [ends] if ends is not None else [], device=new.device)
    stopped = torch.isin(new, stops)
    counts = torch.where(stopped.any(1), stopped.int().argmax(1) + 1, new.shape[1])
    return texts, [int(c) for c in counts]


def sample_vectors(vlm: VLM, samples: Sequence[Sample], level: SampleLevel) -> torch.Tensor:
    """Sample-level vectors of one batch: float32 [B, L, d], row i is h_t - h_c of `samples[i]`."""
    text = capture_inputs(vlm, encode(vlm, [build_request(s, Condition.QUERY) for s in samples]))
    corrupted = [build_request(s, level.corruption, seed=level.seed) for s in samples]
    return text - capture_inputs(vlm, encode(vlm, corrupted))
