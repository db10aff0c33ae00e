"""easy-VQA: its questions, images and captions, out of the package `easy-vqa` 1.0.

5,000 images of one coloured shape each; 38,575 training and 9,673 test questions with 13 answers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Any

from cmrm.errors import MissingExtraError
from cmrm.prompts.sample import Sample

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
"""Appended to visual questions, in training and in benchmarks, as LLaVA does."""

SHAPES = frozenset({"circle", "rectangle", "triangle"})
COLOURS = frozenset({"black", "gray", "red", "green", "blue", "yellow", "brown", "teal"})


@dataclass(frozen=True)
class Question:
    """One visual question of easy-VQA."""

    text: str
    """The question as published, without `SHORT_ANSWER`."""
    answer: str
    """One of easy-VQA's 13 answers."""
    image_id: int
    """Key into `vqa_image_paths` of the same split."""


@cache
def vqa_questions(split: str) -> tuple[Question, ...]:
    """All questions of the published `train` or `test` split, in published order.

    Raises:
        MissingExtraError: easy-vqa is not installed.
    """
    package = _package()
    texts, answers, ids = (
        package.get_train_questions() if split == "train" else package.get_test_questions()
    )
    return tuple(
        Question(text, answer, int(image_id))
        for text, answer, image_id in zip(texts, answers, ids, strict=True)
    )


@cache
def vqa_image_paths(split: str) -> dict[int, str]:
    """Image id -> PNG path of the published `train` or `test` split.

    Raises:
        MissingExtraError: easy-vqa is not installed.
    """
    package = _package()
    paths = package.get_train_image_paths() if split == "train" else package.get_test_image_paths()
    return {int(image_id): str(path) for image_id, path in paths.items()}


def vqa_captions(split: str) -> dict[int, str]:
    """Image id -> `a <colour> <shape>`, as the questions and their answers state them.

    Images whose questions do not state both are left out.
    """
    shapes: dict[int, str] = {}
    colours: dict[int, str] = {}
    for question in vqa_questions(split):
        if question.answer in {"yes", "no"}:
            words = question.text.rstrip("?").split()
            if question.answer == "yes" and not {"no", "not"} & set(words):
                for word in words:
                    if word in SHAPES:
                        shapes[question.image_id] = word
                    elif word in COLOURS:
                        colours[question.image_id] = word
        elif question.answer in SHAPES:
            shapes[question.image_id] = question.answer
        else:
            colours[question.image_id] = question.answer
    return {
        key: f"a {colours[key]} {shapes[key]}" for key in sorted(shapes.keys() & colours.keys())
    }


def vqa_samples(published: str, *, n: int | None, seed: int = 0) -> list[tuple[Sample, str]]:
    """Questions of a published split as samples, each with its answer.

    Args:
        published: `train` or `test`.
        n: draw so many with `seed`; None: all.
        seed: seed of the draw.
    """
    paths = vqa_image_paths(published)
    questions = list(enumerate(vqa_questions(published)))
    if n is not None:
        questions = sorted(random.Random(seed).sample(questions, min(n, len(questions))))
    return [
        (
            Sample(
                id=f"{published}-{number}",
                query=question.text + SHORT_ANSWER,
                image=paths[question.image_id],
            ),
            question.answer,
        )
        for number, question in questions
    ]


def _package() -> Any:
    try:
        import easy_vqa
    except ImportError:
        raise MissingExtraError(
            "easy-VQA is not installed; install it with: pip install 'cmrm[demo]'"
        ) from None
    return easy_vqa
