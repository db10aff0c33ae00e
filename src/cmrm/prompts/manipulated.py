"""The paper's second safety set as a documented recipe: forbidden questions, each with a semantically related COCO image.

Liu et al. (arXiv 2410.09047, section 5) pair 330 JailbreakLLMs prompts with related COCO images and do not publish the pairs.
Here a question gets the image whose captions are nearest to it by TF-IDF cosine (word stems are not cut, English stop words
are), among images that no earlier question took; questions are served in an order shuffled by the seed, and ties are broken
by the seed too. The same files and seed give the same pairs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from cmrm.errors import InputError
from cmrm.prompts.sample import Sample
from cmrm.prompts.tables import read_table

QUESTION_COLUMNS = ("question", "prompt")


def manipulated_jailbreaks(table: Path, captions: Path, images: Path, *, seed: int) -> Iterator[Sample]:
    """Questions of `table` (column question or prompt), each with an image of `images` by COCO's caption annotations.

    Raises:
        InputError: a file has another form, or fewer images than questions lie in the folder.
    """
    rows = read_table(table)
    column = next((c for c in QUESTION_COLUMNS if c in rows[0]), None)
    if column is None:
        raise InputError(f"{table} has no column {' or '.join(QUESTION_COLUMNS)}; it has {', '.join(rows[0])}")
    told = _captions_of_present_images(captions, images)
    if len(told) < len(rows):
        raise InputError(f"{images} holds {len(told)} images with captions; {len(rows)} questions need one each")
    names = sorted(told)
    vectorizer = TfidfVectorizer(stop_words="english").fit([told[n] for n in names] + [r[column] for r in rows])
    nearness = (
        vectorizer.transform([r[column] for r in rows]) @ vectorizer.transform([told[n] for n in names]).T
    ).toarray()
    rng = random.Random(f"jailbreak-llms-{seed}")
    order = list(range(len(rows)))
    rng.shuffle(order)
    tie_break = np.array([rng.random() for _ in names]) * 1e-9
    taken: dict[int, int] = {}
    free = np.ones(len(names), dtype=bool)
    for place in order:
        best = int(np.where(free, nearness[place] + tie_break, -1.0).argmax())
        taken[place] = best
        free[best] = False
    for number, row in enumerate(rows):
        name = names[taken[number]]
        yield Sample(
            f"jailbreak-llms-{number}", row[column], images / name, caption=told[name],
            category=row.get("content_policy_name") or None, label="harmful",
        )  # fmt: skip


def _captions_of_present_images(captions: Path, images: Path) -> dict[str, str]:
    """COCO file name -> its captions in one string, of images that lie in the folder."""
    try:
        content = json.loads(captions.read_text(encoding="utf-8"))
        names = {entry["id"]: entry["file_name"] for entry in content["images"]}
        told: dict[str, list[str]] = {}
        for entry in content["annotations"]:
            told.setdefault(names[entry["image_id"]], []).append(entry["caption"].strip())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{captions} is no COCO caption file: {error}") from None
    present = {file.name for file in images.iterdir()} if images.is_dir() else set()
    return {name: " ".join(lines) for name, lines in told.items() if name in present}
