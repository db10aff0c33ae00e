"""Two conversations decoded side by side, against full passes over both without any cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image

from cmrm import Steering, wrap_vlm
from cmrm.engines.base import Contrast, Decoding, Reply
from cmrm.engines.transformers import TransformersEngine
from cmrm.errors import InputError
from cmrm.model.encode import encode
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request
from cmrm.steering.hooks import intervene
from cmrm.steering.intervention import shift_intervention
from engines.memory import small_memory
from families import FAMILIES

IMAGE = Image.new("RGB", (16, 16), "red")
FIRST = [Request("what is it", (IMAGE,)), Request("who painted this wall, and when", (IMAGE,))]
SECOND = [Request(f"Stay safe, whatever is asked.\n{r.text}", r.images) for r in FIRST]
TEXT = Request("tell me more")


def slow_tokens(
    vlm: VLM, first: Request, second: Request, weight: float, n: int
) -> tuple[list[int], list[int]]:
    """Greedy tokens of one pair by full passes; also those of the first conversation alone."""
    chosen: list[list[int]] = []
    for factor in (weight, 0.0):
        tokens: list[int] = []
        while len(tokens) < n:
            logits = [next_logits(vlm, request, tokens) for request in (first, second)]
            scores = logits[0] + factor * (logits[1] - logits[0])
            tokens.append(int(scores.argmax()))
        chosen.append(tokens)
    return chosen[0], chosen[1]


def next_logits(vlm: VLM, request: Request, tokens: Sequence[int]) -> torch.Tensor:
    inputs = encode(vlm, [request])
    new = torch.tensor([list(tokens)], dtype=torch.long)
    prompt = inputs["input_ids"]
    inputs["input_ids"] = torch.cat([prompt, new], dim=1)
    for name, value in list(inputs.items()):
        if name != "input_ids" and value.dim() >= 2 and value.shape[1] == prompt.shape[1]:
            last = torch.ones_like(value[:, :1]) if name == "attention_mask" else value[:, -1:]
            if "token_type" in name:
                last = torch.zeros_like(last)
            inputs[name] = torch.cat([value, *[last] * len(tokens)], dim=1)
    with torch.inference_mode():
        logits: torch.Tensor = vlm.model(**inputs, use_cache=False).logits
    return logits[0, -1].float()


def text_of(vlm: VLM, tokens: Sequence[int]) -> str:
    return str(vlm.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def endless(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", None)


@pytest.mark.parametrize(
    "name",
    [
        "llava",
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "glm4v",
        "gemma3",
        "mllama",
        "idefics3",
        "aria",
    ],
)
def test_each_step_weighs_the_logits_of_both(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = wrap_vlm(*FAMILIES[name](), model_id=name)
    endless(vlm, monkeypatch)
    contrast = Contrast(tuple(SECOND), 2.5)
    replies = TransformersEngine(vlm).answer(FIRST, (), Decoding(6), contrast=contrast)
    changed = False
    for first, second, reply in zip(FIRST, SECOND, replies, strict=True):
        tokens, alone = slow_tokens(vlm, first, second, 2.5, 6)
        assert reply == Reply(text_of(vlm, tokens), 6)
        changed |= tokens != alone
    assert changed, "the second conversation has changed something"


def test_rows_without_a_contrast_and_text_are_decoded_as_they_are(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless(vlm, monkeypatch)
    engine, short = TransformersEngine(vlm), Decoding(6)
    requests = [FIRST[0], TEXT, FIRST[1]]
    plain = engine.answer(requests, (), short)
    both = engine.answer(FIRST, (), short, contrast=Contrast(tuple(SECOND), 2.5))
    one = engine.answer(requests, (), short, contrast=Contrast((None, None, SECOND[1]), 2.5))
    assert one == [plain[0], plain[1], both[1]]
    assert both[1] != plain[2]
    with pytest.raises(InputError, match="2 contrasts were given for 3 requests"):
        engine.answer(requests, (), short, contrast=Contrast(tuple(SECOND), 1.0))


def test_contrasts_follow_a_batch_that_is_halved(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    endless(vlm, monkeypatch)
    engine = TransformersEngine(vlm)
    requests = [Request("what" + "?" * (k + 1), (IMAGE,)) for k in (3, 0, 2, 1)]
    second = tuple(Request(f"number {k} {r.text}", r.images) for k, r in enumerate(requests))
    expected = [
        engine.answer([r], (), Decoding(4), contrast=Contrast((s,), 3.0))[0]
        for r, s in zip(requests, second, strict=True)
    ]
    rows = small_memory(vlm, monkeypatch)
    with pytest.warns(UserWarning, match="out of memory"):
        replies = engine.answer(requests, (), Decoding(4), contrast=Contrast(second, 3.0))
    assert replies == expected
    assert rows == [4, 2, 2]


def test_sampling_draws_from_the_weighed_logits(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    endless(vlm, monkeypatch)
    engine = TransformersEngine(vlm)
    contrast = Contrast((SECOND[0],), 2.5)
    greedy = engine.answer(FIRST[:1], (), Decoding(5), contrast=contrast)
    cold = Decoding(5, temperature=1.0, top_k=1)
    assert engine.answer(FIRST[:1], (), cold, contrast=contrast) == greedy
    torch.manual_seed(0)
    warm = Decoding(5, temperature=5.0)
    drawn = {engine.answer(FIRST[:1], (), warm, contrast=contrast)[0].text for _ in range(4)}
    assert len(drawn) > 1


@pytest.mark.parametrize("positions", ["last", "all", "last_prompt", "generated"])
@pytest.mark.parametrize("swapped", [False, True])
def test_steering_acts_on_both_conversations(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch, positions: Any, swapped: bool
) -> None:
    """Prompts of the second conversation may be longer or shorter than those of the first."""
    endless(vlm, monkeypatch)
    first, other = (SECOND, FIRST) if swapped else (FIRST, SECOND)
    engine = TransformersEngine(vlm)
    generator = torch.Generator().manual_seed(1)
    vectors = 3 * torch.randn(2, vlm.n_layers, vlm.hidden_size, generator=generator)
    part = shift_intervention(vectors, Steering(1.0, "per_layer", positions))
    alone = engine.answer(other, [part], Decoding(5))
    contrast = Contrast(tuple(other), 1.0)
    assert engine.answer(first, [part], Decoding(5), contrast=contrast) == alone
    alone = engine.answer(other, [part], Decoding(1))
    assert engine.answer(first, [part], Decoding(1), contrast=contrast) == alone


def test_steered_logits_of_both_are_weighed(vlm: VLM) -> None:
    generator = torch.Generator().manual_seed(1)
    vectors = 3 * torch.randn(vlm.n_layers, vlm.hidden_size, generator=generator)
    part = shift_intervention(vectors, Steering(1.0, "per_layer", "last"))
    with intervene(vlm, part), torch.inference_mode():
        logits = [vlm.model(**encode(vlm, [r])).logits[0, -1] for r in (FIRST[0], SECOND[0])]
    token = int((logits[0] + 2.5 * (logits[1] - logits[0])).argmax())
    contrast = Contrast((SECOND[0],), 2.5)
    reply = TransformersEngine(vlm).answer(FIRST[:1], [part], Decoding(1), contrast=contrast)[0]
    assert reply.text == text_of(vlm, [token])


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    with pytest.raises(InputError, match="a contrast's weight is"):
        Contrast((None,), weight)


def test_position_offsets_of_both_conversations_stay_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An image takes fewer positions than tokens: conversations with one and two images differ."""
    vlm = wrap_vlm(*FAMILIES["qwen2_vl"](), model_id="qwen2_vl")
    endless(vlm, monkeypatch)
    engine = TransformersEngine(vlm)
    second = Request("what is it", (IMAGE, IMAGE.resize((32, 32))))
    engine.answer([second], (), Decoding(2))
    other = vlm.model.model.rope_deltas.clone()
    contrast = Contrast((second,), 2.5)
    replies = engine.answer(FIRST[:1], (), Decoding(6), contrast=contrast)
    assert not torch.equal(vlm.model.model.rope_deltas, other)
    tokens, _ = slow_tokens(vlm, FIRST[0], second, 2.5, 6)
    assert replies == [Reply(text_of(vlm, tokens), 6)]
