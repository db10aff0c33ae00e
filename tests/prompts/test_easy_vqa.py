"""easy-VQA: its draws are pinned, since published figures depend on them."""

from __future__ import annotations

import sys

import pytest

from cmrm.errors import MissingExtraError
from cmrm.prompts import easy_vqa as module
from cmrm.prompts.easy_vqa import vqa_captions, vqa_questions, vqa_samples
from pins import pin, shown


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    module.vqa_questions.cache_clear()
    with pytest.raises(MissingExtraError, match=r"pip install 'cmrm\[demo\]'"):
        vqa_questions("test")


@pytest.mark.parametrize("split", ["train", "test"])
def test_captions_agree_with_every_yes_no_question(split: str) -> None:
    pytest.importorskip("easy_vqa")
    captions = vqa_captions(split)
    assert len(captions) > 700
    for question in vqa_questions(split):
        if question.image_id not in captions or question.answer not in {"yes", "no"}:
            continue
        words = question.text.rstrip("?").split()
        named = bool(set(captions[question.image_id].split()[1:]) & set(words))
        negated = bool({"no", "not"} & set(words))
        assert (named != negated) == (question.answer == "yes"), question


@pytest.mark.parametrize(
    ("split", "n", "seed", "expected"),
    [
        ("test", 240, 0, "8a844363258f2477"),
        ("test", None, 0, "ea56faa017f10676"),
        ("train", 1440, 3, "560544b8865f198f"),
    ],
)
def test_draws_of_questions_are_those_of_the_published_figures(
    split: str, n: int | None, seed: int, expected: str
) -> None:
    pytest.importorskip("easy_vqa")
    samples = vqa_samples(split, n=n, seed=seed)
    assert pin((shown(sample), answer) for sample, answer in samples) == expected
