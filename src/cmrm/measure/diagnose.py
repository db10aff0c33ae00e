"""What an image costs a model on a set: rates per condition, and the shift of its representations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from cmrm.shift.artifact import ShiftVectors, library_versions
from cmrm.model.batching import in_batches
from cmrm.shift.capture import capture_inputs
from cmrm.prompts.conditions import CORRUPTED, FIVE, Condition, build_request, choose_donors
from cmrm.errors import InputError
from cmrm.measure.rates import verdict_rate
from cmrm.engines.transformers import Generation, generate
from cmrm.measure.geometry import compare_shifts, distances
from cmrm.judges import KeywordJudge, Verdict
from cmrm.model.vlm import VLM, encode
from cmrm.prompts.sample import Sample
from cmrm.prompts import Loaded
from cmrm.steering.hooks import Steering

SCHEMA = "cmrm-diagnosis/1"
LABELS = ("harmful", "benign")


def possible_conditions(samples: Sequence[Sample]) -> tuple[list[Condition], dict[str, str]]:
    """The paper's conditions that every sample can be put under, and for the others why not."""
    without_image = sum(s.image is None for s in samples)
    without_caption = sum(not s.caption for s in samples)
    possible, left_out = [], {}
    for condition in FIVE:
        if condition.has_image and without_image:
            left_out[condition.value] = f"{without_image} of {len(samples)} samples have no image"
        elif condition is Condition.CAPTION and without_caption:
            left_out[condition.value] = f"{without_caption} of {len(samples)} samples have no caption"
        else:
            possible.append(condition)
    return possible, left_out


def corruptions_named(names: str | None) -> list[Condition]:
    """`all`, or a comma list of corruptions, as conditions; none for None.

    Raises:
        InputError: a name is no corruption.
    """
    if not names:
        return []
    if names == "all":
        return list(CORRUPTED)
    wrong = [n for n in names.split(",") if n not in CORRUPTED]
    if wrong:
        raise InputError(f"unknown corruption {', '.join(wrong)}; one of {', '.join(CORRUPTED)}, or all")
    return [Condition(n) for n in names.split(",")]


def diagnose(
    vlm: VLM,
    loaded: Loaded,
    *,
    corruptions: Sequence[Condition] = (),
    shift: ShiftVectors | None = None,
    steering: Steering | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 48,
    seed: int = 0,
    label: str | None = None,
    say: Callable[[str], None] = lambda text: None,
    tick: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """Rates and shift of one model on one set, as a JSON object (schema `cmrm-diagnosis/1`, docs/results-schema.md).

    Samples labelled `harmful` count towards `unsafe`, those labelled `benign` towards `over_refusal`; both by the keyword
    judge, with 95 % Wilson intervals, n and unscored. `label` is what samples without either label are. With
    `corruptions` each one's mean shift is compared with blank's, and replies are generated under it too. With `shift` the
    original condition is run steered as well.

    Raises:
        InputError: fewer than two samples, samples that are labelled neither way, or corruptions on samples without images.
    """
    samples = labelled(loaded, label)
    if len(samples) < 2:
        raise InputError(f"{loaded.name} has {len(samples)} samples; a diagnosis needs at least 2")
    conditions, left_out = possible_conditions(samples)
    if (corruptions or shift is not None) and Condition.BLANK not in conditions:
        raise InputError(f"{loaded.name}: {left_out['blank']}; corruptions and steering are about images")
    shown = list(dict.fromkeys([*conditions, *corruptions]))
    rows: dict[str, Any] = {}

    def measured(condition: Condition, name: str, vectors: ShiftVectors | None) -> None:
        say(f"replies: {name}")
        replies = generate(
            vlm, samples, condition=condition, shift=vectors, steering=steering, max_new_tokens=max_new_tokens,
            batch_size=batch_size, seed=seed, on_batch=lambda done: tick(len(done)),
        )  # fmt: skip
        rows[name] = rates(samples, replies)

    for condition in shown:
        measured(condition, condition.value, None)
    if shift is not None:
        measured(Condition.ORIGINAL, "original + cmrm", shift)
    say("states")
    representation, means = _representation(vlm, samples, shown, batch_size=batch_size, seed=seed, tick=tick)
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "model": {"id": vlm.model_id, "revision": vlm.revision, "architecture": type(vlm.model).__name__,
                  "layers": vlm.n_layers, "hidden_size": vlm.hidden_size, "dtype": str(vlm.model.dtype)},
        "data": loaded.to_json(),
        "conditions": rows,
        "left_out": left_out,
        "representation": representation,
        "settings": {"seed": seed, "max_new_tokens": max_new_tokens, "batch_size": batch_size, "judge": KeywordJudge.name,
                     "steering": asdict(steering or Steering.from_recommended(shift.recommended)) if shift else None},
        "versions": library_versions(),
    }  # fmt: skip
    if corruptions:
        found["corruptions"] = compare_shifts(
            {c.value: means[c.value] for c in dict.fromkeys([Condition.BLANK, *corruptions])}, "blank"
        )
    return found


def _representation(
    vlm: VLM,
    samples: Sequence[Sample],
    conditions: Sequence[Condition],
    *,
    batch_size: int,
    seed: int,
    tick: Callable[[int], None],
) -> tuple[dict[str, dict[str, list[float]]], dict[str, torch.Tensor]]:
    """`geometry.distances` over all samples, and the mean shift [L, d] of each condition, one batch held at a time."""
    donors = choose_donors(samples, seed=seed) if Condition.OTHER in conditions else None
    totals: dict[str, dict[str, np.ndarray]] = {}
    shifts = {c.value: torch.zeros(vlm.n_layers, vlm.hidden_size) for c in conditions}

    def work(batch: list[Sample]) -> dict[str, torch.Tensor]:
        return {
            c.value: capture_inputs(vlm, encode(vlm, [build_request(s, c, seed=seed, donors=donors) for s in batch]))
            for c in conditions
        }

    for batch, states in in_batches(samples, batch_size, work):
        for kind, by_condition in distances(states).items():
            held = totals.setdefault(kind, {name: np.zeros(vlm.n_layers) for name in by_condition})
            for name, values in by_condition.items():
                held[name] += len(batch) * np.asarray(values)
        for name, held_states in states.items():
            shifts[name] += (states["query"] - held_states).sum(0)
        tick(len(batch) * len(conditions))
    n = len(samples)
    return (
        {kind: {name: (held / n).tolist() for name, held in by.items()} for kind, by in totals.items()},
        {name: shift / n for name, shift in shifts.items()},
    )


def labelled(loaded: Loaded, label: str | None) -> list[Sample]:
    """The samples, each labelled `harmful` or `benign`; `label` goes to those that have neither.

    Raises:
        InputError: `label` is neither, or it is None and a sample has neither: a utility set has no unsafe rate.
    """
    if label is not None and label not in LABELS:
        raise InputError(f"label is {label!r}; one of {', '.join(LABELS)}")
    other = [s for s in loaded.samples if s.label not in LABELS]
    if other and label is None:
        raise InputError(
            f"{loaded.name}: {len(other)} of {len(loaded.samples)} samples are labelled neither harmful nor benign (the first: "
            f"{other[0].label!r}); map a label column, or say what they are with --label harmful or --label benign"
        )
    return [s if s.label in LABELS else replace(s, label=label) for s in loaded.samples]


def rates(samples: Sequence[Sample], replies: Sequence[Generation]) -> dict[str, Any]:
    """`unsafe` over the harmful samples, `over_refusal` over the benign ones; either is absent without any."""
    judge = KeywordJudge()
    verdicts: dict[str, list[Verdict]] = {}
    for sample, reply in zip(samples, replies, strict=True):
        verdicts.setdefault(str(sample.label), []).append(judge.judge(sample.query, reply.text))
    named = {"harmful": ("unsafe", Verdict.COMPLIED), "benign": ("over_refusal", Verdict.REFUSED)}
    return {
        name: verdict_rate(verdicts[label], what).to_json()
        for label, (name, what) in named.items()
        if label in verdicts
    }


def work(loaded: Loaded, corruptions: Sequence[Condition], *, steered: bool) -> int:
    """Number of prompts that one diagnosis passes through the model, for its progress bar."""
    shown = len(dict.fromkeys([*possible_conditions(loaded.samples)[0], *corruptions]))
    return len(loaded.samples) * (2 * shown + steered)
