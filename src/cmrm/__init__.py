"""cmrm gives a vision-language model back the safety alignment that it loses when it sees an image.

Cross-Modality Representation Manipulation (Liu et al., arXiv 2410.09047): the shift that an image causes in each decoder
layer (text-only minus corrupted-image state) is estimated and added back at inference, without training.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmrm.artifact import ShiftVectors
    from cmrm.conditions import Condition
    from cmrm.errors import CmrmError
    from cmrm.generation import Generation, SampleLevel, generate
    from cmrm.judges import KeywordJudge, Verdict
    from cmrm.models import VLM, load_vlm, wrap_vlm
    from cmrm.samples import Sample
    from cmrm.shift import estimate_shift
    from cmrm.steering import Steering, steer

__version__ = "0.1.0"

_WHERE = {
    "CmrmError": "errors",
    "Condition": "conditions",
    "Generation": "generation",
    "KeywordJudge": "judges",
    "Sample": "samples",
    "SampleLevel": "generation",
    "ShiftVectors": "artifact",
    "Steering": "steering",
    "VLM": "models",
    "Verdict": "judges",
    "estimate_shift": "shift",
    "generate": "generation",
    "load_vlm": "models",
    "steer": "steering",
    "wrap_vlm": "models",
}

__all__ = [
    "VLM",
    "CmrmError",
    "Condition",
    "Generation",
    "KeywordJudge",
    "Sample",
    "SampleLevel",
    "ShiftVectors",
    "Steering",
    "Verdict",
    "estimate_shift",
    "generate",
    "load_vlm",
    "steer",
    "wrap_vlm",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"cmrm.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'cmrm' has no attribute {name!r}")
