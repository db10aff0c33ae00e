"""Our own prompt set, its splits, and its samples with easy-VQA images."""

from cmrm.prompts.ours.prompt_set import (
    DISCUSSIONS,
    FORMS,
    Label,
    Part,
    Prompt,
    Split,
    load_prompts,
    train_texts,
)
from cmrm.prompts.ours.samples import (
    DEMO_PER_CATEGORY,
    DEMO_QUESTIONS,
    demo_samples,
    prompt_samples,
)

__all__ = [
    "DEMO_PER_CATEGORY",
    "DEMO_QUESTIONS",
    "DISCUSSIONS",
    "FORMS",
    "Label",
    "Part",
    "Prompt",
    "Split",
    "demo_samples",
    "load_prompts",
    "prompt_samples",
    "train_texts",
]
