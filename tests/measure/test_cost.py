"""What a defence costs a request: prompts, tokens, memory."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from cmrm import Sample
from cmrm.defenses import FitData, make_defense, respond
from cmrm.engines.base import Decoding
from cmrm.engines.transformers import TransformersEngine
from cmrm.measure import cost as module
from cmrm.measure.cost import RESET, Meter, cost_of, peak_memory
from cmrm.model.encode import encode
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request

CPU = torch.device("cpu")
MIB = 2**20
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "grey", "pink", "brown", "cyan")
REQUESTS = [
    Request(f"Tell me about {colour} paint", (Image.new("RGB", (20, 16), colour),))
    for colour in COLOURS
]


def test_the_meter_counts_prompts_and_tokens(vlm: VLM) -> None:
    engine, meter, requests = TransformersEngine(vlm), Meter(), REQUESTS[:2]
    with meter.watching(vlm, 2):
        respond(engine, make_defense("none"), requests, Decoding(4))
    assert meter.per_request()["prefills"] == 1
    assert meter.prompt_tokens == encode(vlm, requests)["input_ids"].numel()
    assert meter.decoded_tokens <= 2 * 3
    assert meter.peak_bytes is None or meter.peak_bytes >= 0
    assert not vlm.layers[0]._forward_pre_hooks


def test_the_sample_level_costs_two_more_prompts_however_they_are_packed(vlm: VLM) -> None:
    engine = TransformersEngine(vlm)
    prefills = {
        name: cost_of(engine, make_defense(name), REQUESTS, Decoding(2), batch_size=4)["prefills"]
        for name in ("none", "cmrm_sample")
    }
    assert prefills["none"] == 1
    assert prefills["cmrm_sample"] is not None
    assert 3 <= prefills["cmrm_sample"] <= 3.5, "the text and the blank image, and a shared prefix"


def test_a_cost_is_per_request_and_knows_the_tensors(vlm: VLM, anchors: list[Sample]) -> None:
    engine, defense = TransformersEngine(vlm), make_defense("cmrm_dataset")
    defense.fit(engine, FitData(anchors, [], 2))
    cost = cost_of(engine, defense, REQUESTS, Decoding(2), batch_size=3)
    assert cost["prefills"] == 1, "no pass more than the untouched model's"
    assert cost["state_bytes"] == 4 * vlm.n_layers * vlm.hidden_size
    assert set(cost) == {
        "prefills", "prompt_tokens", "decoded_tokens", "seconds", "state_bytes", "peak_bytes",
    }  # fmt: skip


@pytest.mark.skipif(not RESET.exists(), reason="this system does not forget a process's peak")
def test_the_peak_is_that_of_the_block() -> None:
    for size in (200, 64):  # the second block's peak is its own, though the first one's was higher
        with peak_memory(CPU) as peak:
            block = torch.ones(size * MIB, dtype=torch.uint8)
            del block
        assert peak.extra is not None
        assert size * MIB * 0.9 < peak.extra < (size + 60) * MIB


def test_without_a_way_to_measure_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_forget_peak", lambda: False)
    with peak_memory(CPU) as peak:
        pass
    assert peak.extra is None
