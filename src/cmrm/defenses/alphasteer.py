"""AlphaSteer, and NullSteer, its form for VLMs: a linear map that leaves benign states alone (Sheng
et al., arXiv 2506.07022; Zhu et al., arXiv 2603.22094)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cmrm.defenses.anchors import anchor_states, scaled_layers
from cmrm.defenses.base import Defense, FitData, typed
from cmrm.defenses.space import LayerRange, Real, Space
from cmrm.engines.base import Engine
from cmrm.errors import InputError
from cmrm.prompts.conditions import Condition, Request
from cmrm.shift.direction import refusal_direction
from cmrm.steering.intervention import Edit, Intervention
from cmrm.steering.setting import Steering

SOURCE_LAYERS = (7, 8, 9, 10, 11, 12, 13, 15, 17, 18)
"""Blocks of 32 behind which the released code for Llama 3.1 8B steers (it acts before the next)."""


class AlphaSteer(Defense):
    """h <- h + alpha M h  with M = D P, once, at the last prompt token.

    P projects onto the null space of benign states: all directions but those with the largest
    eigenvalues of their uncentred covariance, `share` of the width or more. D maps projected
    harmful states to the refusal direction r by ridge regression: D minimises the sum over harmful
    h of norm(D P h - r)^2, plus ridge norm(D P)^2. Since all targets are r, M = r w' with
    w = P H' (H P H' + ridge)^-1 1, H the harmful states row by row: two vectors a layer are stored.

    Read: released code of AlphaSteer (projection, ridge 10, layers, shares 0.3 to 0.6, prefill
    alone); of NullSteer the abstract and part of a summary: the same construction on VLM states.
    Where fewer benign anchors are given than directions are to go, their whole span goes.

    What differs: r is the mean of harmful minus that of benign anchors as text (the source: refused
    minus complied, which takes a judge); states are those with an image; the source adds the last
    token's step to every prompt token of the prefill, here it is added to the last one. alpha is
    that of a public reimplementation.
    """

    name = "alphasteer"
    source = "AlphaSteer, arXiv 2506.07022, and NullSteer, arXiv 2603.22094"
    needs_fit = True
    fits_on_images = True

    def __init__(
        self,
        *,
        alpha: float = 0.4,
        share: float = 0.6,
        ridge: float = 10.0,
        layers: Sequence[int] | None = None,
    ) -> None:
        """`alpha`: strength, >= 0; `share`: of the directions that are kept, 0..1; `ridge`:
        penalty, > 0; `layers`: 0-based, None: the source's, scaled to the depth."""
        super().__init__()
        typed("alpha", alpha, float, "a number, 0 or above")
        typed("share", share, float, "a number between 0 and 1")
        typed("ridge", ridge, float, "a number above 0")
        if not 0.0 < share < 1.0:
            raise InputError(f"share is {share}; it is a number between 0 and 1, such as 0.6")
        if not 0.0 < ridge < float("inf"):
            raise InputError(f"ridge is {ridge}; it is a finite number above 0")
        self.alpha = Steering(alpha=alpha).alpha
        self.share, self.ridge = share, ridge
        self.layers = Steering(layers=None if layers is None else tuple(layers)).layers
        self._made: tuple[torch.Tensor, Intervention] | None = None

    def check(self, engine: Engine) -> None:
        """Raise `InputError` where a layer is none of the model's."""
        self._layers(engine)

    def _layers(self, engine: Engine) -> tuple[int, ...]:
        if self.layers is None:
            return scaled_layers(SOURCE_LAYERS, 32, engine.n_layers)
        return Steering(layers=self.layers).chosen_layers(engine.n_layers)

    @property
    def settings(self) -> dict[str, Any]:
        """Strength, share, penalty and layers."""
        layers = None if self.layers is None else list(self.layers)
        return {"alpha": self.alpha, "share": self.share, "ridge": self.ridge, "layers": layers}

    def space(self, engine: Engine) -> Space:
        """Strength, share, penalty and layers."""
        return (
            Real("alpha", 0.05, 2.0, log=True), Real("share", 0.3, 0.95),
            Real("ridge", 0.1, 1000.0, log=True), LayerRange(engine.n_layers - 1),
        )  # fmt: skip

    @property
    def fitted_by(self) -> tuple[object, ...]:
        """Share and penalty: every layer's map is fitted."""
        return (self.share, self.ridge)

    def fit(self, engine: Engine, data: FitData) -> None:
        """Both vectors of every layer."""
        size = data.batch_size
        harmful = anchor_states(engine, data.harmful, Condition.ORIGINAL, size).double()
        benign = anchor_states(engine, data.benign, Condition.ORIGINAL, size).double()
        removed = engine.hidden_size - int(engine.hidden_size * self.share)
        weights = []
        for layer in range(engine.n_layers):
            spanned = torch.linalg.svd(benign[:, layer], full_matrices=False).Vh[:removed]
            states = harmful[:, layer]
            projected = states - states @ spanned.T @ spanned
            gram = projected @ projected.T
            gram = gram + self.ridge * torch.eye(len(states), dtype=gram.dtype)
            ones = torch.ones(len(states), dtype=gram.dtype)
            weights.append(projected.T @ torch.linalg.solve(gram, ones))
        direction = refusal_direction(engine.states, data.harmful, data.benign, size)
        self.state = {"direction": direction, "reading": torch.stack(weights).float()}

    def intervene(
        self, engine: Engine, requests: Sequence[Request], keys: Sequence[str]
    ) -> list[Intervention]:
        """The map, in rows with an image."""
        direction, reading = self.fitted("direction"), self.fitted("reading")
        if self._made is None or self._made[0] is not reading:
            nothing = torch.zeros(engine.hidden_size)
            edits = tuple(
                Edit(
                    layer, nothing, "affine", float(self.alpha),
                    matrix=torch.outer(direction[layer], reading[layer]),
                )
                for layer in self._layers(engine)
            )  # fmt: skip
            self._made = (reading, Intervention(edits, "last_prompt"))
        return [self._made[1]]
