"""Stage 2: the vision tower learns to name what it sees, by predicting the words of captions (no language model)."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionModel

from cmrm.demo.backbone import IMAGE_SIZE, build_processor, load_tokenizer, vision_config
from cmrm.demo.train.corpus import CaptionedImage, load_emoji, load_vqa_images
from cmrm.demo.train.training import Stage, train
from cmrm.files import atomic_path

BATCH = 32


def pixels(images: list[CaptionedImage]) -> torch.Tensor:
    """Processed images, float32 [n, 3, 64, 64]."""
    processor = build_processor(load_tokenizer()).image_processor
    return torch.cat(
        [processor(images=[i.image for i in images[k : k + 256]], return_tensors="pt")["pixel_values"] for k in range(0, len(images), 256)]
    ).float()  # fmt: skip


def shifted(batch: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Augmentation: mirror and shift each [3, 64, 64] image by up to 6 pixels, edges repeated."""
    padded = F.pad(batch, (6, 6, 6, 6), mode="replicate")
    rows = []
    for image in padded:
        top, left = rng.randrange(13), rng.randrange(13)
        crop = image[:, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
        rows.append(crop.flip(-1) if rng.random() < 0.5 else crop)
    return torch.stack(rows)


def train_tower(folder: Path, emoji: Path, *, steps: int = 1200) -> Path:
    """Train the tower and save it as `folder/tower.safetensors` (float32); return that path.

    Multi-label prediction of caption words (those that occur at least twice) from the mean of the patch states: each
    step sees 32 easy-VQA training images and 32 emoji. The word head is thrown away.
    """
    target = folder / "tower.safetensors"
    if target.exists():
        return target
    torch.manual_seed(1)
    tower = CLIPVisionModel(vision_config())
    shapes, drawn = load_vqa_images("train"), load_emoji(emoji)
    counts = Counter(w for i in shapes + drawn for w in set(i.caption.split()[1:]))
    words = {w: k for k, w in enumerate(sorted(w for w, c in counts.items() if c >= 2))}
    head = nn.Linear(tower.config.hidden_size, len(words))

    def labels(images: list[CaptionedImage]) -> torch.Tensor:
        out = torch.zeros(len(images), len(words))
        for row, image in enumerate(images):
            for word in image.caption.split()[1:]:
                if word in words:
                    out[row, words[word]] = 1.0
        return out

    sets = [(pixels(s), labels(s)) for s in (shapes, drawn)]
    held = load_vqa_images("test")
    held_pixels, held_labels = pixels(held), labels(held)

    def logits_of(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            states = tower(pixel_values=batch).last_hidden_state[:, 1:]
            return head(states.mean(1))

    def loss_of(rng: random.Random) -> torch.Tensor:
        parts = []
        for images, truth in sets:
            rows = rng.sample(range(len(images)), BATCH)
            logits = logits_of(shifted(images[rows], rng))
            parts.append(F.binary_cross_entropy_with_logits(logits.float(), truth[rows], reduction="sum") / len(rows))
        return parts[0] + 0.1 * parts[1]

    @torch.inference_mode()
    def measure(step: int) -> dict[str, float]:
        hits = [
            (logits_of(held_pixels[k : k + 256]).topk(2).indices.sort().values == held_labels[k : k + 256].topk(2).indices.sort().values).all(1)
            for k in range(0, len(held), 256)
        ]  # fmt: skip
        return {"easy_vqa_test_colour_and_shape": round(float(np.mean(torch.cat(hits).numpy())), 4)}

    parameters = dict(tower.named_parameters()) | {f"head.{n}": p for n, p in head.named_parameters()}
    train(Stage("tower", steps, 6e-4, save_every=100), parameters, loss_of, folder / "tower", on_checkpoint=measure)
    with atomic_path(target) as part:
        save_file(tower.state_dict(), str(part))
    return target


def load_tower(path: Path) -> dict[str, torch.Tensor]:
    """State dict of the tower as transformers' `CLIPVisionModel` names it."""
    return load_file(str(path))
