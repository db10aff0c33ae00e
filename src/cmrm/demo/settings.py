"""Settings of `cmrm demo`. Those of the steering were chosen on the anchor split (`demo tune`)."""

from __future__ import annotations

from dataclasses import dataclass

from cmrm.prompts.ours import DEMO_PER_CATEGORY
from cmrm.shift.estimate import Estimator
from cmrm.steering.setting import Steering

LOWER = tuple(range(21))
"""Decoder layers 0 to 20: the layers above still tell benign requests from harmful ones."""
DATASET_STEERING = Steering(alpha=0.37, schedule="telescoped", positions="last", layers=LOWER)
SAMPLE_STEERING = Steering(alpha=0.05, schedule="telescoped", positions="last")
FILL_STEERING = Steering(operator="fill")
"""In the upper half of the layers: what `estimate_shift` recommends, and no choice of ours."""
GATED_STEERING = Steering(schedule="sequential", gate=True)
"""Sequential vectors in all layers above the gate."""
FALSE_ALARMS = 0.15
"""Share of benign requests that the gate may take for harmful ones: chosen on cross-fitted anchors
by the rule of `demo.train.tune_gate`."""
ESTIMATOR: Estimator = "pca"
CORRUPTION = "blank"
ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
"""Strengths of the sweep."""
ANSWER_TOKENS = 6
"""Length limit of an answer to a visual question."""


@dataclass(frozen=True)
class Budget:
    """Size of one run."""

    name: str
    """`quick` or `full`."""
    per_category: int | None
    """Test prompts per harm category and label; None: all 20."""
    vqa: int | None
    """easy-VQA test questions; None: all 9,673."""
    sweep_per_category: int | None
    """Test prompts per category in the alpha sweep."""
    geometry_per_category: int | None
    """Test prompts per category whose states are plotted."""
    anchors_per_category: int | None = None
    """Anchors per category and label; None: all 8."""
    mixed: bool = False
    """Whether the shift of harmful and benign anchors together is measured too."""
    max_new_tokens: int = 24
    """Length limit of a reply; its start shows whether it refuses."""
    batch_size: int = 48
    """Prompts per batch."""
    seed: int = 0
    """Seed of noise and of the draw of questions."""


QUICK = Budget("quick", DEMO_PER_CATEGORY, 144, sweep_per_category=2, geometry_per_category=4)
FULL = Budget("full", None, 1440, sweep_per_category=6, geometry_per_category=8, mixed=True)
