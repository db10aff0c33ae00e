"""Settings of `cmrm demo`. The steering ones were chosen on the anchor split by `cmrm demo tune`; see LOG.md."""

from __future__ import annotations

from dataclasses import dataclass

from cmrm.shift.estimate import Estimator
from cmrm.steering.hooks import Steering

LOWER = tuple(range(21))
"""Steered early, a benign request is still told from a harmful one by the layers above; steered late, both are refused."""
DATASET_STEERING = Steering(alpha=0.37, schedule="telescoped", positions="last", layers=LOWER)
SAMPLE_STEERING = Steering(alpha=0.05, schedule="telescoped", positions="last")
ESTIMATOR: Estimator = "pca"
CORRUPTION = "blank"


@dataclass(frozen=True)
class Budget:
    """How much of the splits one run measures."""

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
    max_new_tokens: int = 24
    """Length limit of a reply; refusals are told by its start."""
    batch_size: int = 48
    """Prompts per batch."""
    seed: int = 0
    """Seed of noise and of the draw of questions."""


QUICK = Budget("quick", per_category=6, vqa=240, sweep_per_category=3, geometry_per_category=4)
FULL = Budget("full", per_category=None, vqa=1440, sweep_per_category=6, geometry_per_category=8)
ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
