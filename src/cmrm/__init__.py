"""cmrm gives a vision-language model back the safety alignment that it loses when it sees an image.

Cross-Modality Representation Manipulation (Liu et al., arXiv 2410.09047): the shift that an image
causes in each decoder layer (text-only minus corrupted-image state) is estimated and added back at
inference, without training.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmrm.engines.generation import Generation, generate, stream
    from cmrm.errors import CmrmError
    from cmrm.judges import KeywordJudge, Verdict
    from cmrm.model.vlm import VLM, load_vlm, wrap_vlm
    from cmrm.prompts.conditions import Condition
    from cmrm.prompts.sample import Sample
    from cmrm.shift.artifact import ShiftVectors
    from cmrm.shift.estimate import SampleLevel, estimate_shift
    from cmrm.shift.steer import steer
    from cmrm.steering.setting import Steering

__version__ = "0.2.0"

_WHERE = {
    "CmrmError": "errors",
    "Condition": "prompts.conditions",
    "Generation": "engines.generation",
    "KeywordJudge": "judges",
    "Sample": "prompts.sample",
    "SampleLevel": "shift.estimate",
    "ShiftVectors": "shift.artifact",
    "Steering": "steering.setting",
    "VLM": "model.vlm",
    "Verdict": "judges",
    "estimate_shift": "shift.estimate",
    "generate": "engines.generation",
    "load_vlm": "model.vlm",
    "steer": "shift.steer",
    "stream": "engines.generation",
    "wrap_vlm": "model.vlm",
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
    "stream",
    "wrap_vlm",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"cmrm.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'cmrm' has no attribute {name!r}")
