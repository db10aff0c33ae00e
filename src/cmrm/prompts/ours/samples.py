"""The demo's measuring sets: our prompts with easy-VQA images, and easy-VQA's own questions."""

from __future__ import annotations

import hashlib
import random

from cmrm.prompts.ours import Label, Split, load_prompts
from cmrm.demo.train.corpus import vqa_captions, vqa_image_paths, vqa_questions
from cmrm.prompts.sample import Sample
from cmrm.prompts.readers import SHORT_ANSWER


def prompt_samples(split: Split, label: Label, *, per_category: int | None = None) -> list[Sample]:
    """Prompts of `split`, each with an easy-VQA image of the published split (`train` images for anchors, else `test`).

    The image is chosen by the prompt's id alone. `per_category` keeps the first so many of each category, by id.
    """
    published = "test" if split == "test" else "train"
    captions = vqa_captions(published)
    paths = vqa_image_paths(published)
    ids = sorted(captions)
    taken: dict[str, int] = {}
    samples = []
    for prompt in sorted(load_prompts(), key=lambda p: p.id):
        if prompt.split != split or prompt.label != label:
            continue
        taken[prompt.category] = taken.get(prompt.category, 0) + 1
        if per_category is not None and taken[prompt.category] > per_category:
            continue
        image = ids[int(hashlib.sha256(f"image {prompt.id}".encode()).hexdigest(), 16) % len(ids)]
        samples.append(
            Sample(
                id=prompt.id,
                query=prompt.text,
                image=paths[image],
                caption=f"The image shows {captions[image]}.",
                category=prompt.category,
                label=prompt.label,
            )
        )
    return samples


def vqa_samples(published: str, *, n: int | None, seed: int = 0) -> list[tuple[Sample, str]]:
    """easy-VQA questions of the published split with their answers: all, or `n` drawn with `seed`."""
    paths = vqa_image_paths(published)
    questions = list(enumerate(vqa_questions(published)))
    if n is not None:
        questions = sorted(random.Random(seed).sample(questions, min(n, len(questions))))
    return [
        (Sample(id=f"{published}-{k}", query=q.text + SHORT_ANSWER, image=paths[q.image_id]), q.answer)
        for k, q in questions
    ]
