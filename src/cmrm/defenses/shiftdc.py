"""Rival defences that change the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from cmrm.shift.capture import capture, capture_inputs
from cmrm.prompts.conditions import Condition, Request, build_request
from cmrm.defenses.base import Defense, FitData, layer_numbers, typed
from cmrm.defenses.prompting import captions
from cmrm.errors import InputError
from cmrm.model.vlm import VLM, encode
from cmrm.prompts.sample import Sample
from cmrm.shift.estimate import estimate_shift
from cmrm.steering.hooks import Edit, Positions, Rows, Steering, edit_states, steer


def mean_text_state(vlm: VLM, samples: Sequence[Sample], batch_size: int) -> torch.Tensor:
    """Mean state float32 [L, d] at the last prompt token of the requests as text alone.

    Raises:
        InputError: no sample was given.
    """
    if not samples:
        raise InputError("harmful and benign anchors are both needed; one of them is empty")
    total = torch.zeros(vlm.n_layers, vlm.hidden_size)
    for at in range(0, len(samples), batch_size):
        batch = [build_request(s, Condition.QUERY) for s in samples[at : at + batch_size]]
        total += capture(vlm, batch, batch_size=batch_size).sum(0)
    return total / len(samples)


def harm_direction(vlm: VLM, data: FitData) -> torch.Tensor:
    """Mean state of harmful minus that of benign requests, as text: float32 [L, d]."""
    harmful = mean_text_state(vlm, data.harmful, data.batch_size)
    return harmful - mean_text_state(vlm, data.benign, data.batch_size)


class ShiftDC(Defense):
    """Takes away the part of the image's shift that lies along the safety direction (Zou et al., arXiv 2502.13095).

    With m = h_image - h_caption at the last prompt token (the caption is the model's own) and s = mean of harmful minus mean
    of benign text states, layer by layer from the middle on:  h <- h - (m . s / |s|^2) s  at the last prompt token.
    """

    name = "shiftdc"
    source = "ShiftDC, arXiv 2502.13095"
    needs_fit = True

    def __init__(self, *, first_layer: int | None = None) -> None:
        """`first_layer`: 0-based; None: the middle."""
        super().__init__()
        if first_layer is not None:
            typed("first_layer", first_layer, int, "a decoder layer, counted from 0")
        self.first_layer = first_layer

    def check(self, vlm: VLM) -> None:
        """Raise `InputError` where the first layer is none of the model's."""
        if self.first_layer is not None:
            Steering(layers=(self.first_layer,)).chosen_layers(vlm.n_layers)

    @property
    def settings(self) -> dict[str, Any]:
        """The first layer."""
        return {"first_layer": self.first_layer}

    def fit(self, vlm: VLM, data: FitData) -> None:
        """The safety direction."""
        self.state = {"safety": harm_direction(vlm, data)}

    def steering(self, vlm: VLM, requests: Sequence[Request], keys: Sequence[str]) -> AbstractContextManager[None]:
        """One generation (the caption) and two passes for each row with an image."""
        safety = self.fitted("safety")
        rows = [k for k, request in enumerate(requests) if request.all_images]
        if not rows:
            return nullcontext()
        first = vlm.n_layers // 2 if self.first_layer is None else self.first_layer
        seen = [requests[k] for k in rows]
        told = [
            replace(request.without_images(), text=f"{caption}\n{request.text}")
            for request, caption in zip(seen, captions(vlm, seen), strict=True)
        ]
        moved = capture_inputs(vlm, encode(vlm, seen)) - capture_inputs(vlm, encode(vlm, told))
        share = (moved * safety).sum(-1, keepdim=True) / safety.square().sum(-1, keepdim=True).clamp_min(1e-12)
        vectors = torch.zeros(len(requests), vlm.n_layers, vlm.hidden_size)
        vectors[rows] = -share * safety
        return steer(vlm, vectors, Steering(1.0, "per_layer", "last_prompt", tuple(range(first, vlm.n_layers))))


class NullSpace(Defense):
    """Projects states onto the null space of the modality direction (arXiv 2603.14825):  h <- h - (h . u) u, one pass.

    u is the unit direction of the mean shift, text minus blank image, of each layer.
    """

    name = "null_space"
    source = "null-space projection, arXiv 2603.14825"
    needs_fit = True
    fits_on_images = True

    def __init__(self, *, layers: Sequence[int] | None = None, positions: Positions = "all") -> None:
        """`layers`: 0-based, None: all; `positions` as in `steering`."""
        super().__init__()
        self.setting = Steering(layers=layer_numbers(layers), positions=positions)

    def check(self, vlm: VLM) -> None:
        """Raise `InputError` where a layer is none of the model's."""
        self.setting.chosen_layers(vlm.n_layers)

    @property
    def settings(self) -> dict[str, Any]:
        """Layers and positions."""
        return {"layers": self.setting.layers, "positions": self.setting.positions}

    def fit(self, vlm: VLM, data: FitData) -> None:
        """The modality direction."""
        mean = estimate_shift(vlm, data.shifted, estimator="mean", batch_size=data.batch_size).vectors
        self.state = {"direction": mean / mean.norm(dim=-1, keepdim=True).clamp_min(1e-12)}

    def steering(self, vlm: VLM, requests: Sequence[Request], keys: Sequence[str]) -> AbstractContextManager[None]:
        """The projection, in rows with an image."""
        direction = self.fitted("direction")
        edits = {layer: _projection(direction[layer]) for layer in self.setting.chosen_layers(vlm.n_layers)}
        return edit_states(vlm, edits, self.setting.positions)


def _projection(direction: torch.Tensor) -> Edit:
    def edit(hidden: torch.Tensor, state: Rows) -> torch.Tensor:
        u = direction.to(hidden.device, hidden.dtype)
        return hidden - state.factor(hidden) * (hidden @ u)[..., None] * u

    return edit


class RefusalDirection(Defense):
    """Adds the difference in means of harmful and benign text states at one layer, at every position (arXiv 2406.11717)."""

    name = "refusal_direction"
    source = "refusal-direction addition, arXiv 2406.11717"
    needs_fit = True

    def __init__(self, *, layer: int | None = None, alpha: float = 1.0) -> None:
        """`layer`: 0-based, None: at 60 % of the depth; `alpha`: strength, >= 0 (never taken away)."""
        super().__init__()
        if layer is not None:
            typed("layer", layer, int, "a decoder layer, counted from 0")
        typed("alpha", alpha, float, "a number, 0 or above")
        self.layer = layer
        self.alpha = Steering(alpha=alpha).alpha

    def check(self, vlm: VLM) -> None:
        """Raise `InputError` where the layer is none of the model's."""
        if self.layer is not None:
            Steering(layers=(self.layer,)).chosen_layers(vlm.n_layers)

    @property
    def settings(self) -> dict[str, Any]:
        """Layer and strength."""
        return {"layer": self.layer, "alpha": self.alpha}

    def fit(self, vlm: VLM, data: FitData) -> None:
        """The refusal direction of every layer."""
        self.state = {"refusal": harm_direction(vlm, data)}

    def steering(self, vlm: VLM, requests: Sequence[Request], keys: Sequence[str]) -> AbstractContextManager[None]:
        """The addition, in rows with an image."""
        layer = round(0.6 * (vlm.n_layers - 1)) if self.layer is None else self.layer
        return steer(vlm, self.fitted("refusal"), Steering(self.alpha, "per_layer", "all", (layer,)))
