"""How a sample is put to the model: the paper's five conditions, and further corrupted images.

The five input conditions (Liu et al., arXiv 2410.09047, section 2):

| condition | text | image | role |
|---|---|---|---|
| original | query | the sample's | what is deployed |
| blank | query | plain white | corrupted image: the modality without meaning |
| noise | query | noise N(127.5, 64) a channel, clipped, seeded | corrupted image, second kind |
| caption | caption, newline, query | none | text only, the image's meaning kept |
| query | query | none | text only |

Further corrupted images, to compare what each does to the shift (the paper has blank and noise):

| condition | image |
|---|---|
| black | plain black |
| grey | plain mid-grey (128, 128, 128) |
| mean | plain, in the image's own mean colour |
| blur | Gaussian blur, radius one eighth of the longer side: colours and layout stay |
| shuffle | an 8 x 8 grid of patches in seeded random order: colours and local texture stay |
| other | the image of another sample of the same set, seeded: a meaning, but the wrong one |

A corrupted image has the size of the original. The same seed and sample id give the same pixels on
any machine. Of a sample with several images each is corrupted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import count
from typing import Literal

import numpy as np
from PIL import Image, ImageFilter

from cmrm.errors import InputError
from cmrm.prompts.sample import Sample, open_images
from cmrm.prompts.text import shortened

NOISE_MEAN = 127.5
NOISE_STD = 64.0
BLUR_SHARE = 1 / 8
SHUFFLE_GRID = 8


class Condition(StrEnum):
    """How a sample is put to the model; see the module's tables."""

    ORIGINAL = "original"
    BLANK = "blank"
    NOISE = "noise"
    CAPTION = "caption"
    QUERY = "query"
    BLACK = "black"
    GREY = "grey"
    MEAN = "mean"
    BLUR = "blur"
    SHUFFLE = "shuffle"
    OTHER = "other"

    @property
    def has_image(self) -> bool:
        """Whether the prompt holds an image; text-only conditions carry no placeholder either."""
        return self not in {Condition.CAPTION, Condition.QUERY}


FIVE = (Condition.ORIGINAL, Condition.BLANK, Condition.NOISE, Condition.CAPTION, Condition.QUERY)
"""The paper's conditions."""

PLAIN_COLOURS = {
    Condition.BLANK: (255, 255, 255),
    Condition.BLACK: (0, 0, 0),
    Condition.GREY: (128, 128, 128),
}
"""RGB of the plain images."""

CORRUPTED = tuple(c for c in Condition if c.has_image and c is not Condition.ORIGINAL)
"""The conditions that can stand for the corrupted image."""


@dataclass(frozen=True)
class Turn:
    """One earlier turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    """Whose turn it is."""
    text: str
    """The text of the turn."""
    images: tuple[Image.Image, ...] = ()
    """RGB images, before the text."""


@dataclass(frozen=True)
class Request:
    """What the chat template is filled with: a user's turn, and the turns before it."""

    text: str
    """The turn's text."""
    images: tuple[Image.Image, ...] = ()
    """RGB images; empty for text only."""
    image_last: bool = False
    """Whether the images stand after the text instead of before it."""
    before: tuple[Turn, ...] = ()
    """Earlier turns of the conversation: a system turn, questions and replies."""
    id: str = field(default="", compare=False)
    """The id of the sample that is asked, for messages; two requests are equal without it."""

    @property
    def all_images(self) -> tuple[Image.Image, ...]:
        """The images of the conversation in the order of its turns."""
        return (*(image for turn in self.before for image in turn.images), *self.images)

    def without_images(self) -> Request:
        """The same conversation as text alone."""
        before = tuple(replace(turn, images=()) for turn in self.before)
        return replace(self, images=(), before=before)

    def corrupted(self, condition: Condition, *, seed: int, key: str) -> Request:
        """The same conversation with each of its images corrupted.

        Args:
            condition: one of `CORRUPTED`, but not `other`.
            seed: seed of noise and shuffle.
            key: what the first image is drawn for, such as the sample's id.
        """
        keys = (key if number == 0 else f"{key}\0{number}" for number in count())

        def corrupted_images(images: tuple[Image.Image, ...]) -> tuple[Image.Image, ...]:
            return tuple(corrupt(image, condition, seed=seed, key=next(keys)) for image in images)

        before = tuple(replace(turn, images=corrupted_images(turn.images)) for turn in self.before)
        return replace(self, images=corrupted_images(self.images), before=before)


def build_request(
    sample: Sample,
    condition: Condition | str,
    *,
    seed: int = 0,
    donors: Mapping[str, Sample] | None = None,
) -> Request:
    """The request of a sample under a condition.

    Args:
        sample: what is asked.
        condition: how it is put.
        seed: seed of noise and shuffle.
        donors: sample id -> the sample that lends its image (`choose_donors`); for `other` alone.

    Raises:
        InputError: the condition is unknown, or needs an image, a caption or another sample that
            is missing.
    """
    try:
        condition = Condition(condition)
    except ValueError:
        raise InputError(
            f"unknown condition {shortened(condition)!r}; one of {', '.join(Condition)}"
        ) from None
    if condition is Condition.QUERY:
        return Request(sample.query, id=sample.id)
    if condition is Condition.CAPTION:
        if not sample.caption:
            raise InputError(f"{sample.owner} has no caption, which the caption condition needs")
        return Request(f"{sample.caption}\n{sample.query}", id=sample.id)
    images = open_images(sample)
    if condition is Condition.OTHER:
        if donors is None or sample.id not in donors:
            raise InputError(
                f"{sample.owner}: the condition 'other' takes its image from another sample of a "
                "set"
            )
        donated = open_images(donors[sample.id])[0]
        images = tuple(donated.resize(image.size) for image in images)
    request = Request(sample.query, images, sample.image_last, id=sample.id)
    if condition in {Condition.ORIGINAL, Condition.OTHER}:
        return request
    return request.corrupted(condition, seed=seed, key=sample.id)


def build_requests(
    samples: Sequence[Sample], condition: Condition | str, *, seed: int = 0
) -> Iterator[Request]:
    """`build_request` over a whole set, lazily and in order; `other` takes images of this set."""
    donors = choose_donors(samples, seed=seed) if condition == Condition.OTHER else None
    for sample in samples:
        yield build_request(sample, condition, seed=seed, donors=donors)


def choose_donors(samples: Sequence[Sample], *, seed: int = 0) -> dict[str, Sample]:
    """Sample id -> another sample that lends its image: the next in an order shuffled by `seed`.

    Raises:
        InputError: fewer than two samples have an image.
    """
    ring = sorted(
        (sample for sample in samples if sample.image is not None),
        key=lambda sample: _digest(seed, sample.id),
    )
    if len(ring) < 2:
        raise InputError(
            f"the condition 'other' needs at least 2 samples with an image; there are {len(ring)}"
        )
    return {sample.id: ring[(place + 1) % len(ring)] for place, sample in enumerate(ring)}


def corrupt(image: Image.Image, condition: Condition, *, seed: int, key: str) -> Image.Image:
    """An RGB image corrupted, of the same size. Not for `original` and `other`.

    `seed` and `key` decide noise and shuffle.
    """
    if condition is Condition.NOISE:
        return noise_image(image.size, seed=seed, key=key)
    if condition is Condition.BLUR:
        return image.filter(ImageFilter.GaussianBlur(BLUR_SHARE * max(image.size)))
    if condition is Condition.SHUFFLE:
        return shuffle_patches(image, seed=seed, key=key)
    if condition is Condition.MEAN:
        means = np.asarray(image, dtype=np.float64).mean(axis=(0, 1)).round()
        red, green, blue = (int(level) for level in means)
        return Image.new("RGB", image.size, (red, green, blue))
    return Image.new("RGB", image.size, PLAIN_COLOURS[condition])


def noise_image(size: tuple[int, int], *, seed: int, key: str) -> Image.Image:
    """Gaussian noise, N(127.5, 64) a channel, clipped to 0..255; size is (width, height)."""
    values = _generator(seed, key).normal(NOISE_MEAN, NOISE_STD, (size[1], size[0], 3))
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def shuffle_patches(image: Image.Image, *, seed: int, key: str) -> Image.Image:
    """Patches of an 8 x 8 grid (fewer in a small image) in random order; the edge's rest stays."""
    pixels = np.asarray(image).copy()
    rows, columns = min(SHUFFLE_GRID, image.height), min(SHUFFLE_GRID, image.width)
    height, width = image.height // rows, image.width // columns
    places = [
        (
            slice(row * height, (row + 1) * height),
            slice(column * width, (column + 1) * width),
        )
        for row in range(rows)
        for column in range(columns)
    ]
    patches = [pixels[place].copy() for place in places]
    order = _generator(seed, key).permutation(len(places))
    for place, source in zip(places, order, strict=True):
        pixels[place] = patches[source]
    return Image.fromarray(pixels)


def _generator(seed: int, key: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(_digest(seed, key)[:8], "big"))


def _digest(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "surrogatepass")).digest()
