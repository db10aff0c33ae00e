"""ASTRA's adaptive law: steering as strong as a state points along a harmful direction (Wang et
al., arXiv 2411.16721)."""

from __future__ import annotations

from collections.abc import Sequence

from cmrm.defenses.anchors import anchor_states
from cmrm.defenses.base import FitData
from cmrm.defenses.one_layer import OneLayer
from cmrm.engines.base import Engine
from cmrm.prompts.conditions import Condition, Request
from cmrm.steering.intervention import Edit, Intervention


class Astra(OneLayer):
    """At one layer, at the last prompt token and every generated one:

        h <- h - alpha norm(h) relu(cos(h - h0, v)) v / norm(v)

    The law is that of the released code (read in a fork) and of a summary of the paper; layer (the
    20th block of 40, the 14th of 28: the middle) and alpha (10 for LLaVA, 7 for Qwen2-VL) are those
    of its commands.

    What differs: the source finds v by image attribution on adversarial images, as the mean
    difference of states with and without the tokens that make a jailbreak. No adversarial image is
    built here: v is the mean difference of harmful anchors' states with their image and as text
    alone, at the last prompt token. h0 is the mean state of all anchors that have an image; the
    source's is one of images as well. No claim is made on the paper's figures.
    """

    name = "astra"
    source = "ASTRA's adaptive law, arXiv 2411.16721; the direction is ours"
    fits_on_images = True
    strengths = (0.5, 40.0)

    def __init__(self, *, layer: int | None = None, alpha: float = 10.0) -> None:
        """`layer`: 0-based, None: the middle; `alpha`: strength, >= 0."""
        super().__init__(layer=layer, alpha=alpha)

    def default_layer(self, n_layers: int) -> int:
        """The last layer of the lower half."""
        return max(0, n_layers // 2 - 1)

    def fit(self, engine: Engine, data: FitData) -> None:
        """Direction and origin of every layer."""
        size = data.batch_size
        seen = anchor_states(engine, data.harmful, Condition.ORIGINAL, size)
        text = anchor_states(engine, data.harmful, Condition.QUERY, size)
        others = [sample for sample in (*data.benign, *data.more) if sample.image is not None]
        total, count = seen.sum(0), len(seen)
        if others:
            states = anchor_states(engine, others, Condition.ORIGINAL, size)
            total, count = total + states.sum(0), count + len(states)
        self.state = {"harm": seen.mean(0) - text.mean(0), "origin": total / count}

    def intervene(
        self, engine: Engine, requests: Sequence[Request], keys: Sequence[str]
    ) -> list[Intervention]:
        """The law, in rows with an image."""
        layer = self.chosen_layer(engine)
        harm, origin = self.fitted("harm")[layer], self.fitted("origin")[layer]
        away = -harm / harm.norm().clamp_min(1e-12)
        edit = Edit(layer, away, "oppose", float(self.alpha), origin=origin)
        return [Intervention((edit,), "last")]
