"""Stage 2: the vision tower alone learns to predict the words of captions."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from cmrm.demo.backbone import IMAGE_SIZE, build_processor, build_tower, load_tokenizer
from cmrm.demo.train.corpus import CaptionedImage, load_emoji, load_vqa_images
from cmrm.demo.train.training import Stage, train
from cmrm.files import atomic_path

BATCH = 32
"""Images of each of the two sets (easy-VQA, emoji) in one step."""
SHIFT = 6
"""Largest shift of an image in pixels."""
CHUNK = 256
"""Images that are processed at once where nothing is trained."""


def pixels(images: list[CaptionedImage]) -> torch.Tensor:
    """Processed images, float32 [n, 3, 64, 64]."""
    processor = build_processor(load_tokenizer()).image_processor
    chunks = []
    for start in range(0, len(images), CHUNK):
        pictures = [captioned.image for captioned in images[start : start + CHUNK]]
        chunks.append(processor(images=pictures, return_tensors="pt")["pixel_values"])
    return torch.cat(chunks).float()


def shifted(images: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """`images` [n, 3, 64, 64], each shifted by up to 6 pixels (edges repeated), half mirrored."""
    padded = F.pad(images, (SHIFT, SHIFT, SHIFT, SHIFT), mode="replicate")
    rows = []
    for image in padded:
        top, left = rng.randrange(2 * SHIFT + 1), rng.randrange(2 * SHIFT + 1)
        crop = image[:, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
        rows.append(crop.flip(-1) if rng.random() < 0.5 else crop)
    return torch.stack(rows)


def train_tower(folder: Path, emoji: Path, *, steps: int = 1200) -> Path:
    """Train the vision tower into `folder/tower.safetensors` (float32) and return that path.

    The tower predicts which caption words apply (those that occur at least twice), from the mean of
    its patch states. Each step sees 32 easy-VQA training images and 32 emoji. The linear head that
    predicts the words is not saved.
    """
    target = folder / "tower.safetensors"
    if target.exists():
        return target
    torch.manual_seed(1)
    tower = build_tower()
    shapes, drawings = load_vqa_images("train"), load_emoji(emoji)
    vocabulary = _vocabulary(shapes + drawings)
    head = nn.Linear(tower.config.hidden_size, len(vocabulary))
    sets = [(pixels(images), _word_labels(images, vocabulary)) for images in (shapes, drawings)]
    test_images = load_vqa_images("test")
    test_pixels, test_labels = pixels(test_images), _word_labels(test_images, vocabulary)

    def logits_of(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            states = tower(pixel_values=images).last_hidden_state[:, 1:]
            logits: torch.Tensor = head(states.mean(1))
            return logits

    def loss_of(rng: random.Random) -> torch.Tensor:
        losses = []
        for images, labels in sets:
            rows = rng.sample(range(len(images)), BATCH)
            logits = logits_of(shifted(images[rows], rng)).float()
            loss = F.binary_cross_entropy_with_logits(logits, labels[rows], reduction="sum")
            losses.append(loss / len(rows))
        return losses[0] + 0.1 * losses[1]

    @torch.inference_mode()
    def measure(step: int) -> dict[str, float]:
        hits = 0
        for start in range(0, len(test_images), CHUNK):
            predicted = _two_words(logits_of(test_pixels[start : start + CHUNK]))
            labelled = _two_words(test_labels[start : start + CHUNK])
            hits += int((predicted == labelled).all(1).sum())
        return {"easy_vqa_test_colour_and_shape": round(hits / len(test_images), 4)}

    parameters = dict(tower.named_parameters())
    parameters |= {f"head.{name}": parameter for name, parameter in head.named_parameters()}
    stage = Stage("tower", steps, 6e-4, save_every=100)
    train(stage, parameters, loss_of, folder / "tower", on_checkpoint=measure)
    with atomic_path(target) as part:
        save_file(tower.state_dict(), str(part))
    return target


def _vocabulary(images: list[CaptionedImage]) -> dict[str, int]:
    """Column of each caption word that at least two images have; the article is no word."""
    counts = Counter(word for image in images for word in set(image.caption.split()[1:]))
    words = sorted(word for word, count in counts.items() if count >= 2)
    return {word: column for column, word in enumerate(words)}


def _word_labels(images: list[CaptionedImage], vocabulary: dict[str, int]) -> torch.Tensor:
    """1.0 where the caption has the word, float32 [n, words]."""
    labels = torch.zeros(len(images), len(vocabulary))
    for row, image in enumerate(images):
        for word in image.caption.split()[1:]:
            if word in vocabulary:
                labels[row, vocabulary[word]] = 1.0
    return labels


def _two_words(scores: torch.Tensor) -> torch.Tensor:
    """Columns of the two highest scores of each row, ascending; int64 [n, 2]."""
    return scores.topk(2).indices.sort().values
