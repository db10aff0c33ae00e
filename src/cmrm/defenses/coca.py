"""CoCA: the model's logits are moved towards those that it has under a safety principle (Gao et
al., arXiv 2409.11365)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cmrm.defenses.base import Defense, typed
from cmrm.defenses.safety_prompt import SAFETY_PROMPT, prompted
from cmrm.defenses.space import Real, Space
from cmrm.engines.base import Contrast, Engine
from cmrm.errors import InputError
from cmrm.prompts.conditions import Request
from cmrm.steering.setting import Steering


class CoCA(Defense):
    """Constitutional calibration: two decodes, one of them under a safety principle.

    At every step:  logits <- logits + alpha (logits with the principle - logits without).

    Only the abstract and secondary accounts were read. They agree on the "safety delta", the
    difference of the two logits, and its weight; none gives the weight's value or the words of the
    principle. The default weight 2 amplifies the prompt's effect, which is the paper's aim; the
    principle is that of `safety_prompt`. If the paper adds the delta to the logits WITH the
    principle, its alpha is ours minus 1.
    """

    name = "coca"
    source = "our reading of CoCA, arXiv 2409.11365"

    def __init__(self, *, alpha: float = 2.0, principle: str = SAFETY_PROMPT) -> None:
        """`alpha`: weight of the difference, >= 0; `principle`: text before the request."""
        super().__init__()
        typed("alpha", alpha, float, "a number, 0 or above")
        typed("principle", principle, str, "a text")
        if not principle.strip():
            raise InputError("principle is empty; it is a text, such as a sentence about safety")
        self.alpha = Steering(alpha=alpha).alpha
        self.principle = principle

    @property
    def settings(self) -> dict[str, Any]:
        """Weight and principle."""
        return {"alpha": self.alpha, "principle": self.principle}

    def space(self, engine: Engine) -> Space:
        """The weight; the principle stays."""
        return (Real("alpha", 0.25, 6.0, log=True),)

    def contrast(self, engine: Engine, requests: Sequence[Request]) -> Contrast | None:
        """The requests under the principle, in rows with an image."""
        if not any(request.all_images for request in requests):
            return None
        second = (prompted(r, self.principle) if r.all_images else None for r in requests)
        return Contrast(tuple(second), float(self.alpha))
