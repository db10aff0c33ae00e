"""`steer`: shift vectors, or an artifact that holds them, applied to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from cmrm.errors import InputError
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Condition, Request, build_request
from cmrm.prompts.sample import Sample
from cmrm.shift.artifact import ShiftVectors
from cmrm.shift.pair import Prefixes, text_states
from cmrm.shift.resolve import resolved
from cmrm.steering.hooks import Session, intervene
from cmrm.steering.intervention import shift_intervention
from cmrm.steering.setting import Steering


def steer(
    vlm: VLM,
    shift: ShiftVectors | torch.Tensor,
    steering: Steering | None = None,
    *,
    alpha: float | None = None,
    has_image: Sequence[bool] | torch.Tensor | None = None,
    requests: Sequence[Sample | Request] | None = None,
) -> Session:
    """Steer every forward pass of `vlm.model` inside the block: `with steer(vlm, shift): ...`.

    Rows without an image are left alone. Only passes of the calling context (thread, asyncio task)
    are steered.

    Args:
        vlm: the model.
        shift: an artifact, whose match with the model is checked, or raw vectors: float [L, d] for
            all rows, or [B, L, d] with one set a row, for the sample level.
        steering: setting; an artifact's recommended one, or the `calibrated` preset, when None.
        alpha: strength, >= 0, instead of the setting's.
        has_image: which rows hold an image. None: read from each prompt's `input_ids`; needed where
            the model is called with `inputs_embeds`, or with a KV cache that was filled elsewhere.
        requests: what the batch inside the block asks, row by row; `fill` alone needs it, and runs
            each once as text before the block begins. Another turn asks something else: open a
            block of its own for it.

    Raises:
        ArtifactError: the artifact belongs to another model.
        InputError: alpha < 0, a layer out of range, vectors of another shape, with NaN, or beyond
            the model's dtype; the artifact does not hold what the setting needs.
        SteeringError: inside, before a pass that cannot be classified; on exit, when no pass was
            run, a row with an image was not touched, or a chosen layer never ran.
    """
    if isinstance(shift, ShiftVectors):
        shift.check(vlm)
        steering = steering or shift.recommended
        if alpha is not None:
            steering = replace(steering, alpha=alpha)
        text = None if requests is None else partial(_text_states, vlm, requests)
        return intervene(vlm, *resolved(shift, steering, text), has_image=has_image)
    vectors = shift
    steering = steering or Steering()
    if alpha is not None:
        steering = replace(steering, alpha=alpha)
    if steering.gate:
        raise InputError("raw vectors have no gate; steer with an artifact that holds one")
    if vectors.dim() not in {2, 3} or tuple(vectors.shape[-2:]) != (vlm.n_layers, vlm.hidden_size):
        raise InputError(
            f"vectors are {tuple(vectors.shape)}; this model takes [{vlm.n_layers}, "
            f"{vlm.hidden_size}], "
            "or one such set a row"
        )
    return intervene(vlm, shift_intervention(vectors, steering), has_image=has_image)


def _text_states(vlm: VLM, asked: Sequence[Sample | Request]) -> torch.Tensor:
    """States float32 [B, L, d] of requests as text alone."""
    requests = [
        build_request(part, Condition.QUERY) if isinstance(part, Sample) else part for part in asked
    ]
    return text_states(requests, Prefixes(vlm))
