"""The demo's corpus, packing and choice rule."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from cmrm.prompts.ours import FORMS, load_prompts, train_texts
from cmrm.demo import connect as connect_module
from cmrm.demo.train.align import text_loss
from cmrm.demo.train.connect import packed_loss
from cmrm.demo.train.corpus import generic_instructions, load_emoji, vqa_captions, vqa_questions
from cmrm.demo.train.training import Stage, learning_rate, train
from cmrm.demo.train.tune import choose
from cmrm.errors import InputError
from conftest import tiny_model


@pytest.mark.parametrize("split", ["train", "test"])
def test_captions_agree_with_every_yes_no_question(split: str) -> None:
    captions = vqa_captions(split)
    assert len(captions) > 700
    for question in vqa_questions(split):
        if question.image_id not in captions or question.answer not in {"yes", "no"}:
            continue
        words = question.text.rstrip("?").split()
        seen = bool(set(captions[question.image_id].split()[1:]) & set(words))
        negated = bool({"no", "not"} & set(words))
        assert (seen != negated) == (question.answer == "yes"), question


def test_training_requests_are_apart_from_anchor_and_test() -> None:
    held = {p.text for p in load_prompts() if p.split != "train"} | {
        p.act for p in load_prompts() if p.split != "train"
    }
    for label in ("harmful", "benign"):
        texts = [t for part in (1, 2, 3, 4, 5, 6) for t in train_texts(label, part)]
        assert not held & set(texts)
    assert not {p.text for p in load_prompts()} & set(generic_instructions())
    harmful = {p.act for p in load_prompts() if p.label == "harmful" and p.split == "train"}
    discussions = train_texts("benign", 6)
    assert len(discussions) == 6 * len(harmful)
    assert all(any(act in text for act in harmful) for text in discussions)
    assert not train_texts("harmful", 6)
    assert not set(discussions) & {form.format(act) for act in harmful for form in FORMS}, (
        "none asks for the act itself"
    )


def test_missing_emoji_archive_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="npm pack"):
        load_emoji(tmp_path / "none.tgz")


def test_packed_turns_are_computed_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(connect_module, "IMAGE_TOKENS", 4)
    head = [1, 50, 3, 3, 3, 3, 60]
    turns = [([70, 71, 72, 73], 2), ([80, 81, 82], 1), ([90, 91, 92, 93, 94], 3)]
    pixels = torch.randn(1, 3, 16, 16)
    with torch.inference_mode():
        together = packed_loss(model, pixels, head, [turns])
        alone = torch.stack([packed_loss(model, pixels, head, [[turn]]) for turn in turns]).mean()
        plain = []
        for ids, n in turns:
            with torch.autocast("cpu", torch.bfloat16):
                out = model(input_ids=torch.tensor([head + ids]), pixel_values=pixels).logits[0].float()
            at = len(head) + len(ids)
            losses = torch.nn.functional.cross_entropy(
                out[at - n - 1 : at - 1], torch.tensor(ids[-n:]), reduction="none"
            )
            weights = torch.tensor([4.0, 4.0, 1.0]) if n == 3 else torch.ones(n)
            plain.append((losses * weights).sum() / weights.sum())
    assert torch.allclose(together, alone, atol=2e-2)
    assert torch.allclose(together, torch.stack(plain).mean(), atol=5e-2)


def test_text_loss_looks_at_answers_only() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    rows = [([1, 2, 3, 4, 5], 2), ([6, 7, 8], 1)]
    with torch.inference_mode():
        ours = text_loss(model, rows)
        first = torch.nn.functional.cross_entropy(
            model(torch.tensor([[1, 2, 3, 4, 5]])).logits[0, 2:4], torch.tensor([4, 5])
        )
        second = torch.nn.functional.cross_entropy(model(torch.tensor([[6, 7, 8]])).logits[0, 1:2], torch.tensor([8]))
    assert torch.allclose(ours, (first + second) / 2, atol=2e-2)
    with torch.inference_mode():
        three = text_loss(model, [([1, 2, 3, 4, 5], 3)])
        each = torch.nn.functional.cross_entropy(
            model(torch.tensor([[1, 2, 3, 4, 5]])).logits[0, 1:4], torch.tensor([3, 4, 5]), reduction="none"
        )
    assert torch.allclose(three, (each * torch.tensor([4.0, 4.0, 1.0])).sum() / 9, atol=2e-2)


def test_training_resumes_with_the_same_batches(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def run(folder: Path, *, die_at: int | None, average: float | None = None) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.zeros(3))
        count = 0

        def loss_of(rng: random.Random) -> torch.Tensor:
            nonlocal count
            count += 1
            if die_at is not None and count > die_at:
                raise Killed
            return (weight - torch.tensor([rng.random() for _ in range(3)])).square().sum()

        train(Stage("toy", 12, 0.1, save_every=5), {"w": weight}, loss_of, folder, average=average)
        return weight.detach()

    whole = run(tmp_path / "whole", die_at=None)
    with pytest.raises(Killed):
        run(tmp_path / "cut", die_at=7)
    assert torch.equal(run(tmp_path / "cut", die_at=None), whole)
    mean = run(tmp_path / "mean", die_at=None, average=0.5)
    assert not torch.equal(mean, whole)
    with pytest.raises(Killed):
        run(tmp_path / "mean-cut", die_at=7, average=0.5)
    assert torch.equal(run(tmp_path / "mean-cut", die_at=None, average=0.5), mean)


def test_learning_rate_warms_up_and_decays() -> None:
    stage = Stage("s", 100, 1.0)
    rates = [learning_rate(stage, k) for k in range(100)]
    assert rates[0] < rates[2] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_choice_of_the_setting_keeps_within_the_cost() -> None:
    def row(level: str, alpha: float, unsafe: float, over: float, accuracy: float) -> dict[str, object]:
        return {"level": level, "alpha": alpha, "unsafe_rate": unsafe, "over_refusal": over, "accuracy": accuracy}

    rows = [
        row("none", 0, 0.8, 0.0, 0.9),
        row("dataset", 0.5, 0.4, 0.02, 0.9),
        row("dataset", 1.0, 0.2, 0.04, 0.88),
        row("dataset", 1.5, 0.1, 0.20, 0.88),
        row("dataset", 2.0, 0.0, 0.04, 0.50),
        row("sample", 1.0, 0.0, 0.5, 0.1),
    ]
    assert choose(rows, "dataset") == rows[2]
    assert choose(rows, "dataset", over_refusal_base=0.18) == rows[3]
    assert choose(rows, "sample") is None
