"""The paper's second safety set by a recipe: forbidden questions, each with a related COCO image.

Liu et al. (arXiv 2410.09047, section 5) pair 330 JailbreakLLMs prompts with related COCO images and
do not publish the pairs. Here a question gets the image whose captions are nearest to it by the
cosine of TF-IDF vectors (without stemming, without English stop words), among images that no
earlier question took. The seed decides the order of the questions and breaks ties. The same files
and seed give the same pairs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cmrm.errors import InputError, MissingExtraError
from cmrm.prompts.sample import Sample
from cmrm.prompts.tables import read_json, read_table
from cmrm.prompts.text import listed, shortened

QUESTION_COLUMN = "question"


def manipulated_jailbreaks(
    table: Path, captions: Path, images: Path, *, seed: int
) -> Iterator[Sample]:
    """Forbidden questions, each with an image of a folder by COCO's caption annotations.

    Args:
        table: `forbidden_question_set.csv`, with a column `question`.
        captions: COCO's `captions_val2014.json`.
        images: folder of the COCO images.
        seed: decides the order of the questions, and ties.

    Raises:
        InputError: a file has another form, or the folder holds fewer images than questions.
        MissingExtraError: scikit-learn is not installed.
    """
    rows = read_table(table)
    if any(not row.get(QUESTION_COLUMN) for row in rows):
        raise InputError(
            f"{table} has rows without a {QUESTION_COLUMN!r}; its columns are {listed(rows[0])}"
        )
    questions = [str(row[QUESTION_COLUMN]) for row in rows]
    described = _captions_of_present_images(captions, images)
    if len(described) < len(questions):
        raise InputError(
            f"{images} holds {len(described)} images with captions; {len(questions)} questions "
            "need one each"
        )
    names = sorted(described)
    chosen = _paired(questions, [described[name] for name in names], seed)
    for number, (row, question) in enumerate(zip(rows, questions, strict=True)):
        name = names[chosen[number]]
        yield Sample(
            f"jailbreak-llms-{number}",
            question,
            images / name,
            caption=described[name],
            category=row.get("content_policy_name") or None,
            label="harmful",
        )


def _paired(questions: list[str], captions: list[str], seed: int) -> dict[int, int]:
    """Number of a question -> number of its caption; no caption is taken twice."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise MissingExtraError(
            "pairing questions with images needs scikit-learn; install it with: "
            "pip install 'cmrm[eval]'"
        ) from None
    vectorizer = TfidfVectorizer(stop_words="english").fit([*captions, *questions])
    nearness = (vectorizer.transform(questions) @ vectorizer.transform(captions).T).toarray()
    generator = random.Random(f"jailbreak-llms-{seed}")
    order = list(range(len(questions)))
    generator.shuffle(order)
    tie_break = np.array([generator.random() for _ in captions]) * 1e-9
    free = np.ones(len(captions), dtype=bool)
    chosen: dict[int, int] = {}
    for question in order:
        nearest = int(np.where(free, nearness[question] + tie_break, -1.0).argmax())
        chosen[question] = nearest
        free[nearest] = False
    return chosen


def _captions_of_present_images(captions: Path, images: Path) -> dict[str, str]:
    """COCO file name -> its captions in one string, of images that the folder holds."""
    content = read_json(captions)
    lines: dict[str, list[str]] = {}
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        for annotation in content["annotations"]:
            name = names[annotation["image_id"]]
            lines.setdefault(name, []).append(annotation["caption"].strip())
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{captions} is no COCO caption file: {shortened(error)}") from None
    present = {file.name for file in images.iterdir()} if images.is_dir() else set()
    return {name: " ".join(texts) for name, texts in lines.items() if name in present}
