"""How a sample is put to the model: the paper's five conditions, and further corruptions of the image.

The five input conditions (Liu et al., arXiv 2410.09047, section 2):

| condition | text | image | role |
|---|---|---|---|
| original | query | the sample's | what is deployed |
| blank | query | plain white | corrupted image: the modality without meaning |
| noise | query | Gaussian noise, N(127.5, 64) a channel, clipped, seeded | corrupted image, second kind |
| caption | caption, newline, query | none | text only, the image's meaning kept |
| query | query | none | text only |

Further corrupted images, to compare what each does to the shift (the paper uses blank and noise):

| condition | image |
|---|---|
| black | plain black |
| grey | plain mid-grey (128, 128, 128) |
| mean | plain, in the image's own mean colour |
| blur | Gaussian blur, radius one eighth of the longer side: colours and layout stay |
| shuffle | an 8 x 8 grid of patches in seeded random order: colours and local texture stay |
| other | the image of another sample of the same set, seeded: a meaning, but the wrong one |

A corrupted image has its original's size, and the same seed and sample id give the same pixels on any machine. A sample
with several images has each of them corrupted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import count
from typing import Literal

import numpy as np
from PIL import Image, ImageFilter

from cmrm.errors import InputError
from cmrm.prompts.sample import Sample, open_images

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

PLAIN_COLOURS = {Condition.BLANK: (255, 255, 255), Condition.BLACK: (0, 0, 0), Condition.GREY: (128, 128, 128)}
"""RGB of the plain images."""

CORRUPTED = tuple(c for c in Condition if c.has_image and c is not Condition.ORIGINAL)
"""The conditions that can stand for the corrupted image."""


@dataclass(frozen=True)
class Turn:
    """One earlier turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    """Who speaks."""
    text: str
    """What is said."""
    images: tuple[Image.Image, ...] = ()
    """RGB, before the text."""


@dataclass(frozen=True)
class Request:
    """What is put before the chat template: a user turn, and what was said before it."""

    text: str
    """The turn's text."""
    images: tuple[Image.Image, ...] = ()
    """RGB; empty for text-only."""
    image_last: bool = False
    """Images behind the text instead of before it."""
    before: tuple[Turn, ...] = ()
    """Turns of the conversation before this one: a system turn, earlier questions and replies."""

    @property
    def all_images(self) -> tuple[Image.Image, ...]:
        """The conversation's images in the order of its turns."""
        return (*(image for turn in self.before for image in turn.images), *self.images)

    def without_images(self) -> Request:
        """The same conversation as text alone."""
        return replace(self, images=(), before=tuple(replace(turn, images=()) for turn in self.before))

    def corrupted(self, condition: Condition, *, seed: int, key: str) -> Request:
        """The same conversation, each of its images corrupted; the first one's noise is drawn for `key`."""
        keys = (key if k == 0 else f"{key}\x00{k}" for k in count())

        def changed(images: tuple[Image.Image, ...]) -> tuple[Image.Image, ...]:
            return tuple(corrupt(image, condition, seed=seed, key=next(keys)) for image in images)

        before = tuple(replace(turn, images=changed(turn.images)) for turn in self.before)
        return replace(self, images=changed(self.images), before=before)


def build_request(
    sample: Sample, condition: Condition | str, *, seed: int = 0, donors: Mapping[str, Sample] | None = None
) -> Request:
    """`sample` under `condition`; `donors` (from `choose_donors`) is needed by the condition `other` alone.

    Raises:
        InputError: the condition is unknown, or needs an image, a caption or another sample that is not there.
    """
    try:
        condition = Condition(condition)
    except ValueError:
        raise InputError(f"unknown condition {condition!r}; one of {', '.join(Condition)}") from None
    if condition is Condition.QUERY:
        return Request(sample.query)
    if condition is Condition.CAPTION:
        if not sample.caption:
            raise InputError(f"sample {sample.id!r} has no caption, which the caption condition needs")
        return Request(f"{sample.caption}\n{sample.query}")
    images = open_images(sample)
    if condition is Condition.OTHER:
        if donors is None or sample.id not in donors:
            raise InputError(
                f"sample {sample.id!r}: the condition 'other' takes its image from another sample of a set"
            )
        donated = open_images(donors[sample.id])[0]
        images = tuple(donated.resize(image.size) for image in images)
    elif condition is not Condition.ORIGINAL:
        return Request(sample.query, images, sample.image_last).corrupted(condition, seed=seed, key=sample.id)
    return Request(sample.query, images, sample.image_last)


def build_requests(samples: Sequence[Sample], condition: Condition | str, *, seed: int = 0) -> Iterator[Request]:
    """`build_request` over a whole set, in order, each as it is asked for; the set's own images are `other`'s donors."""
    donors = choose_donors(samples, seed=seed) if condition == Condition.OTHER else None
    for sample in samples:
        yield build_request(sample, condition, seed=seed, donors=donors)


def choose_donors(samples: Sequence[Sample], *, seed: int = 0) -> dict[str, Sample]:
    """For each sample with an image another one that lends it its own: the next in an order shuffled by `seed`.

    Raises:
        InputError: fewer than two samples have an image.
    """
    ring = sorted((s for s in samples if s.image is not None), key=lambda s: _digest(seed, s.id))
    if len(ring) < 2:
        raise InputError(f"the condition 'other' needs at least 2 samples with an image, {len(ring)} were given")
    return {sample.id: ring[(k + 1) % len(ring)] for k, sample in enumerate(ring)}


def corrupt(image: Image.Image, condition: Condition, *, seed: int, key: str) -> Image.Image:
    """`image` (RGB) corrupted, same size; `seed` and `key` decide noise and shuffle. Not for `original` and `other`."""
    if condition is Condition.NOISE:
        return noise_image(image.size, seed=seed, key=key)
    if condition is Condition.BLUR:
        return image.filter(ImageFilter.GaussianBlur(BLUR_SHARE * max(image.size)))
    if condition is Condition.SHUFFLE:
        return shuffle_patches(image, seed=seed, key=key)
    if condition is Condition.MEAN:
        red, green, blue = (int(v) for v in np.asarray(image, dtype=np.float64).mean(axis=(0, 1)).round())
        return Image.new("RGB", image.size, (red, green, blue))
    return Image.new("RGB", image.size, PLAIN_COLOURS[condition])


def noise_image(size: tuple[int, int], *, seed: int, key: str) -> Image.Image:
    """Gaussian noise, N(127.5, 64) a channel, clipped to 0..255; size is (width, height) in pixels."""
    values = _generator(seed, key).normal(NOISE_MEAN, NOISE_STD, (size[1], size[0], 3))
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8), "RGB")


def shuffle_patches(image: Image.Image, *, seed: int, key: str) -> Image.Image:
    """Patches of an 8 x 8 grid in random order (fewer where the image is smaller); a remainder at the edge stays."""
    pixels = np.asarray(image).copy()
    rows, columns = min(SHUFFLE_GRID, image.height), min(SHUFFLE_GRID, image.width)
    high, wide = image.height // rows, image.width // columns
    places = [
        (slice(r * high, (r + 1) * high), slice(c * wide, (c + 1) * wide)) for r in range(rows) for c in range(columns)
    ]
    patches = [pixels[place].copy() for place in places]
    for place, source in zip(places, _generator(seed, key).permutation(len(places)), strict=True):
        pixels[place] = patches[source]
    return Image.fromarray(pixels, "RGB")


def _generator(seed: int, key: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(_digest(seed, key)[:8], "big"))


def _digest(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed}\x00{key}".encode()).digest()
