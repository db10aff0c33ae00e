"""The engine and the anchors that every defence is tested on."""

from __future__ import annotations

import pytest

from cmrm.defenses import FitData
from cmrm.engines.transformers import TransformersEngine
from cmrm.model.vlm import VLM
from defenses.oracle import anchor_set


@pytest.fixture(scope="module")
def engine(vlm: VLM) -> TransformersEngine:
    return TransformersEngine(vlm)


@pytest.fixture(scope="module")
def data() -> FitData:
    return anchor_set()
