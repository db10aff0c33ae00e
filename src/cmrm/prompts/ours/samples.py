"""Samples of our prompt set: each prompt with an easy-VQA image; the set that the demo measures."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from cmrm.prompts.easy_vqa import vqa_captions, vqa_image_paths, vqa_samples
from cmrm.prompts.ours.prompt_set import Label, Split, load_prompts
from cmrm.prompts.sample import Sample

DEMO_PER_CATEGORY = 6
"""Test prompts per harm category and label that `cmrm demo` measures."""
DEMO_QUESTIONS = 240
"""easy-VQA test questions that `cmrm demo` measures."""


def prompt_samples(split: Split, label: Label, *, per_category: int | None = None) -> list[Sample]:
    """Prompts of one split and label, each with an easy-VQA image chosen by the prompt's id.

    Test prompts get images of easy-VQA's test split, all others of its training split.

    Args:
        split: `train`, `anchor` or `test`.
        label: `harmful` or `benign`.
        per_category: keep the first so many of each category, by id; None: all.
    """
    published = "test" if split == "test" else "train"
    captions = vqa_captions(published)
    paths = vqa_image_paths(published)
    image_ids = sorted(captions)
    taken: dict[str, int] = {}
    samples = []
    for prompt in sorted(load_prompts(), key=lambda prompt: prompt.id):
        if prompt.split != split or prompt.label != label:
            continue
        taken[prompt.category] = taken.get(prompt.category, 0) + 1
        if per_category is not None and taken[prompt.category] > per_category:
            continue
        digest = hashlib.sha256(f"image {prompt.id}".encode()).hexdigest()
        image_id = image_ids[int(digest, 16) % len(image_ids)]
        samples.append(
            Sample(
                id=prompt.id,
                query=prompt.text,
                image=paths[image_id],
                caption=f"The image shows {captions[image_id]}.",
                category=prompt.category,
                label=prompt.label,
            )
        )
    return samples


def demo_samples(limit: int | None = None) -> list[Sample]:
    """The set that `cmrm demo` measures: harmful requests, benign look-alikes, visual questions.

    All have images of easy-VQA's test split. `limit` is a number of each kind, spread over the harm
    categories; None: as many as `cmrm demo` takes.
    """
    per_category = DEMO_PER_CATEGORY if limit is None else max(1, limit // 12)
    harmful = prompt_samples("test", "harmful", per_category=per_category)[:limit]
    benign = prompt_samples("test", "benign", per_category=per_category)[:limit]
    drawn = vqa_samples("test", n=DEMO_QUESTIONS if limit is None else limit)
    return [*harmful, *benign, *(replace(sample, answer=answer) for sample, answer in drawn)]
