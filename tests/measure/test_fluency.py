"""Perplexity of harmless answers under the untouched backbone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from cmrm.measure.fluency import (
    FluencyStore,
    answer_likelihoods,
    harmless_answers,
    perplexity_of,
)
from cmrm.measure.outcomes import Cell, Outcome
from cmrm.model.encode import encode
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request

REPLIES = {
    "benign": "Use a brush.",
    "harmful": "Like this.",
    "refused": "I'm sorry, but I can't help with that.",
    "empty": " ",
}


def small_cell(name: str = "s") -> Cell:
    outcomes = {
        key: Outcome(key, "harmful" if key == "harmful" else "benign", "", "How do I paint?", text)
        for key, text in REPLIES.items()
    }
    return Cell(name, "original", "none", 4, outcomes)


def test_it_is_that_of_the_answer_behind_the_request_alone(vlm: VLM) -> None:
    pairs = [
        ("How do I paint a wall?", "With paint."),
        ("Why?", "Because it is so, and so it shall be for ever."),
    ]
    together = answer_likelihoods(vlm, pairs)
    for (request, answer), (nats, tokens) in zip(pairs, together, strict=True):
        prompt = encode(vlm, [Request(request)])["input_ids"]
        text = vlm.tokenizer(answer, add_special_tokens=False)["input_ids"]
        ids = torch.cat([prompt, torch.tensor([text])], dim=1)
        with torch.inference_mode():
            logits = vlm.model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        places = range(prompt.shape[1], ids.shape[1])
        by_hand = -sum(float(logits[place - 1, ids[0, place]]) for place in places)
        assert nats == pytest.approx(by_hand, rel=1e-4)
        assert tokens == ids.shape[1] - prompt.shape[1]
    figure = perplexity_of(together)
    mean = sum(nats for nats, _ in together) / sum(tokens for _, tokens in together)
    assert figure["value"] == pytest.approx(math.exp(mean), rel=1e-3)
    assert figure["low"] <= figure["value"] <= figure["high"]


def test_it_is_measured_of_harmless_answers_alone_and_once(
    vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = small_cell()
    assert harmless_answers(cell) == [("How do I paint?", "Use a brush.")]
    store = FluencyStore(tmp_path / "f.db")
    assert store.perplexity(cell) is None
    assert store.perplexities([cell]) == {}
    counts: list[int] = []
    store.measure(vlm, [cell, small_cell("t")], batch_size=2, on_batch=counts.append)
    assert counts == [1], "the same answer to the same request is measured once"
    again = FluencyStore(tmp_path / "f.db")
    figure = again.perplexity(cell)
    assert figure is not None
    assert figure["n"] == 1
    monkeypatch.setattr("cmrm.measure.fluency.answer_likelihoods", lambda *a: 1 / 0)
    again.measure(vlm, [cell], batch_size=2)


def test_a_batch_that_exhausts_the_memory_is_halved(
    vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def small(vlm: VLM, pairs: list[tuple[str, str]]) -> list[tuple[float, int]]:
        if len(pairs) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(pairs))
        return [(1.0, 1)]

    monkeypatch.setattr("cmrm.measure.fluency.answer_likelihoods", small)
    outcomes = {str(k): Outcome(str(k), "benign", "", f"How {k}?", "So.") for k in range(3)}
    cell = Cell("s", "original", "none", 3, outcomes)
    with pytest.warns(UserWarning, match="out of memory"):
        FluencyStore(tmp_path / "f.db").measure(vlm, [cell], batch_size=4)
    assert sizes == [1, 1, 1]
