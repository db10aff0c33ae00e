"""`steer`: shift vectors, or an artifact that holds them, applied to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from cmrm.errors import InputError
from cmrm.model.vlm import VLM
from cmrm.shift.artifact import ShiftVectors
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

    Raises:
        ArtifactError: the artifact belongs to another model.
        InputError: alpha < 0, a layer out of range, vectors of another shape, with NaN, or beyond
            the model's dtype.
        SteeringError: inside, before a pass that cannot be classified; on exit, when no pass was
            run, a row with an image was not touched, or a chosen layer never ran.
    """
    if isinstance(shift, ShiftVectors):
        shift.check(vlm)
        vectors = shift.vectors
        steering = steering or shift.recommended
    else:
        vectors = shift
        steering = steering or Steering()
    if alpha is not None:
        steering = replace(steering, alpha=alpha)
    if vectors.dim() not in {2, 3} or tuple(vectors.shape[-2:]) != (vlm.n_layers, vlm.hidden_size):
        raise InputError(
            f"vectors are {tuple(vectors.shape)}; this model takes [{vlm.n_layers}, "
            f"{vlm.hidden_size}], "
            "or one such set a row"
        )
    return intervene(vlm, shift_intervention(vectors, steering), has_image=has_image)
