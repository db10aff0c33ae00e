"""A playground on the tiny model."""

from __future__ import annotations

from dataclasses import replace

import torch

from cmrm import ShiftVectors, Steering
from cmrm.engines.transformers import TransformersEngine
from cmrm.judges import make_judge
from cmrm.model.identity import identity_of
from cmrm.model.vlm import VLM
from cmrm.shift.artifact import Provenance
from cmrm.steering.gate import Gate
from cmrm.ui.session import Session


def artifact(vlm: VLM) -> ShiftVectors:
    shape = (vlm.n_layers, vlm.hidden_size)
    draw = torch.Generator().manual_seed(2)
    vectors, direction = (torch.randn(shape, generator=draw) for _ in range(2))
    gate = Gate("linear", (0,), torch.randn(1, shape[1], generator=draw), -1e6)
    made = Provenance(vlm.model_id, None, type(vlm.model).__name__, shape[1], shape[0])
    return ShiftVectors(
        vectors, made, Steering(operator="fill"), {"direction": direction}, gate=gate,
        identity=identity_of(vlm),
    )  # fmt: skip


def session(vlm: VLM, max_new_tokens: int = 12) -> Session:
    vlm = replace(vlm)
    engine = TransformersEngine(vlm)
    return Session(engine, artifact(vlm), make_judge("keyword"), max_new_tokens)
