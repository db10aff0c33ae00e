"""Text alignment: its loss, and libraries that are missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from cmrm.demo.train.align import align, split_answers, text_loss
from cmrm.demo.train.corpus import generic_instructions
from cmrm.errors import MissingExtraError


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def target_losses(model: LlamaForCausalLM, ids: list[int], targets: int) -> torch.Tensor:
    logits = model(torch.tensor([ids])).logits[0, -targets - 1 : -1]
    return cross_entropy(logits, torch.tensor(ids[-targets:]), reduction="none")


def test_text_loss_averages_targets_of_a_row_then_rows(model: LlamaForCausalLM) -> None:
    rows = [([1, 2, 3, 4, 5], 2), ([6, 7, 8], 1)]
    expected = sum(target_losses(model, ids, targets).mean() for ids, targets in rows) / 2
    with torch.inference_mode():
        assert torch.allclose(text_loss(model, rows), torch.as_tensor(expected), atol=2e-2)


def test_first_two_targets_weigh_four_times(model: LlamaForCausalLM) -> None:
    ids = [1, 2, 3, 4, 5]
    weights = torch.tensor([4.0, 4.0, 1.0])
    expected = (target_losses(model, ids, 3) * weights).sum() / 9
    with torch.inference_mode():
        assert torch.allclose(text_loss(model, [(ids, 3)]), expected, atol=2e-2)


def test_answers_are_split_by_their_instruction() -> None:
    everyday = {"question": generic_instructions()[0], "answer": "Yes.", "whole": True}
    look_alike = {"question": "How do I whittle wood?", "answer": "Slowly.", "whole": True}
    assert split_answers([everyday, look_alike]) == ([look_alike], [everyday])  # type: ignore[list-item]


def test_alignment_without_peft_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"needs peft; .*cmrm\[demo\]"):
        align(tmp_path)
