"""The five input conditions of one sample (Liu et al., arXiv 2410.09047, section 2).

| condition | text | image | role |
|---|---|---|---|
| original | query | the sample's | what is deployed |
| blank | query | plain white, same size | corrupted image: the modality without meaning |
| noise | query | Gaussian noise, same size, seeded | corrupted image, second kind |
| caption | caption, newline, query | none | text only, the image's meaning kept |
| query | query | none | text only |
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from PIL import Image

from cmrm.errors import InputError
from cmrm.samples import Sample, open_image

BLANK_COLOUR = (255, 255, 255)
NOISE_MEAN = 127.5
NOISE_STD = 64.0


class Condition(StrEnum):
    """How a sample is put to the model."""

    ORIGINAL = "original"
    BLANK = "blank"
    NOISE = "noise"
    CAPTION = "caption"
    QUERY = "query"

    @property
    def has_image(self) -> bool:
        """Whether the prompt holds an image; text-only conditions carry no placeholder either."""
        return self in {Condition.ORIGINAL, Condition.BLANK, Condition.NOISE}


CORRUPTED = (Condition.BLANK, Condition.NOISE)
"""The conditions that can stand for the corrupted image."""


@dataclass(frozen=True)
class Request:
    """What is put before the chat template: one user turn."""

    text: str
    image: Image.Image | None
    """RGB, or None for text-only."""


def build_request(sample: Sample, condition: Condition | str, *, seed: int = 0) -> Request:
    """`sample` under `condition`. The same seed and sample id give the same noise, on any machine.

    Raises:
        InputError: the condition is unknown, or needs an image or a caption that the sample lacks.
    """
    try:
        condition = Condition(condition)
    except ValueError:
        raise InputError(f"unknown condition {condition!r}; one of {', '.join(Condition)}") from None
    if condition is Condition.QUERY:
        return Request(sample.query, None)
    if condition is Condition.CAPTION:
        if not sample.caption:
            raise InputError(f"sample {sample.id!r} has no caption, which the caption condition needs")
        return Request(f"{sample.caption}\n{sample.query}", None)
    image = open_image(sample)
    if condition is Condition.BLANK:
        image = Image.new("RGB", image.size, BLANK_COLOUR)
    elif condition is Condition.NOISE:
        image = noise_image(image.size, seed=seed, key=sample.id)
    return Request(sample.query, image)


def noise_image(size: tuple[int, int], *, seed: int, key: str) -> Image.Image:
    """Gaussian noise, N(127.5, 64) a channel, clipped to 0..255; size is (width, height) in pixels."""
    digest = hashlib.sha256(f"{seed}\x00{key}".encode()).digest()
    values = np.random.default_rng(int.from_bytes(digest[:8], "big")).normal(
        NOISE_MEAN, NOISE_STD, (size[1], size[0], 3)
    )
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8), "RGB")
