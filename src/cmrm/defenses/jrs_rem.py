"""JRS-Rem: takes the jailbreak-related part of the image's shift away (Wei et al., arXiv
2603.17372)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cmrm.defenses.anchors import anchor_states
from cmrm.defenses.base import Defense, FitData, typed
from cmrm.defenses.space import LayerRange, Real, Space
from cmrm.engines.base import Engine
from cmrm.errors import InputError
from cmrm.prompts.conditions import Condition, Request
from cmrm.steering.intervention import Intervention, shift_intervention
from cmrm.steering.setting import Steering


class JrsRem(Defense):
    """Takes away what the image adds along the jailbreak direction, where it is a large share.

    With m = h_image - h_text at the last prompt token, d = unit(mean jailbroken - mean refused) and
    s = m . d, layer by layer:  h <- h - s d  where s / norm(m) > threshold, at the last prompt
    token, once.

    Read in one detailed summary of the paper (its repository is empty): equation, threshold 0.2,
    every layer, the first generated token alone, two extra passes, d from 50 jailbroken and 50
    refused samples.

    What differs: which anchors are answered and which refused is not known without a judge.
    "Jailbroken" are harmful anchors with their image, "refused" the same requests as text alone.
    """

    name = "jrs_rem"
    source = "our reading of JRS-Rem, arXiv 2603.17372"
    needs_fit = True
    fits_on_images = True

    def __init__(self, *, threshold: float = 0.2, layers: Sequence[int] | None = None) -> None:
        """`threshold`: share of the shift above which it is taken away, -1..1; `layers`: 0-based,
        None: all."""
        super().__init__()
        typed("threshold", threshold, float, "a number from -1 to 1")
        if not -1.0 <= threshold <= 1.0:
            raise InputError(f"threshold is {threshold}; it is a number from -1 to 1")
        self.threshold = threshold
        self.steering = Steering(
            1.0, "per_layer", "last_prompt", None if layers is None else tuple(layers)
        )

    def check(self, engine: Engine) -> None:
        """Raise `InputError` where a layer is none of the model's."""
        self.steering.chosen_layers(engine.n_layers)

    @property
    def settings(self) -> dict[str, Any]:
        """Threshold and layers."""
        return {"threshold": self.threshold, "layers": self.steering.to_json()["layers"]}

    def space(self, engine: Engine) -> Space:
        """Threshold and layers."""
        return (Real("threshold", 0.0, 0.8), LayerRange(engine.n_layers - 1))

    @property
    def fitted_by(self) -> tuple[object, ...]:
        """Nothing: every layer's direction is fitted."""
        return ()

    def fit(self, engine: Engine, data: FitData) -> None:
        """The jailbreak direction of every layer."""
        size = data.batch_size
        jailbroken = anchor_states(engine, data.harmful, Condition.ORIGINAL, size).mean(0)
        refused = anchor_states(engine, data.harmful, Condition.QUERY, size).mean(0)
        difference = jailbroken - refused
        length = difference.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        self.state = {"jailbreak": difference / length}

    def intervene(
        self, engine: Engine, requests: Sequence[Request], keys: Sequence[str]
    ) -> list[Intervention]:
        """Two passes for each row with an image."""
        direction = self.fitted("jailbreak")
        rows = [k for k, request in enumerate(requests) if request.all_images]
        if not rows:
            return []
        seen = [requests[k] for k in rows]
        moved = engine.states(seen, batch_size=len(seen)) - engine.text_states(seen)
        along = (moved * direction).sum(-1, keepdim=True)
        share = along / moved.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        vectors = torch.zeros(len(requests), engine.n_layers, engine.hidden_size)
        vectors[rows] = torch.where(share > self.threshold, -along * direction, 0.0)
        return [shift_intervention(vectors, self.steering)]
