"""Ordinary perturbations of an image, at several levels: what cameras, screens and uploads do.

| name | level | what is done |
|---|---|---|
| gaussian | standard deviation, share of 255 | seeded Gaussian noise on every channel, clipped |
| salt | share of the pixels | seeded pixels become black or white, half each |
| jpeg | quality 1..95 | saved as JPEG and read again |
| blur | radius, share of the longer side | Gaussian blur |
| crop | share of each side that stays | cut out of the middle; the image becomes smaller |
| resize | share of each side | made smaller, and back to its size (bilinear) |
| contrast | factor; below 1 is flatter | distance of each pixel from the image's mean grey |

Nothing here is optimised against a model. The same seed, sample id and level give the same pixels
on any machine; JPEG depends on Pillow's library.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from cmrm.errors import InputError
from cmrm.prompts.sample import Sample, open_images


class _Kind(NamedTuple):
    """One kind of perturbation."""

    levels: tuple[float, ...]
    """Levels of a sweep, the mildest first."""
    low: float
    """Least level."""
    high: float
    """Largest level."""
    done: Callable[[Image.Image, float, np.random.Generator], Image.Image]
    """What is done to an RGB image."""


@dataclass(frozen=True)
class Perturbation:
    """One kind at one level."""

    name: str
    """One of `PERTURBATIONS`."""
    level: float
    """See the module's table."""

    def __post_init__(self) -> None:
        kind = PERTURBATIONS.get(self.name)
        if kind is None:
            raise InputError(
                f"unknown perturbation {self.name[:40]!r}; one of {', '.join(PERTURBATIONS)}"
            )
        if not kind.low <= self.level <= kind.high:
            raise InputError(
                f"the level of {self.name} is {self.level:g}; it is within {kind.low:g}.."
                f"{kind.high:g}"
            )

        if self.name == "jpeg" and self.level != int(self.level):
            raise InputError(f"the quality of jpeg is a whole number, not {self.level:g}")

    @classmethod
    def parse(cls, text: str) -> Perturbation:
        """`jpeg:20`.

        Raises:
            InputError: it is no such pair, or the level is out of range.
        """
        name, colon, level = text.strip().partition(":")
        try:
            number = float(level)
        except ValueError:
            number = float("nan")
        if not colon or number != number:
            raise InputError(
                f"{text[:40]!r} is no perturbation; expected NAME:LEVEL, such as jpeg:20"
            )
        return cls(name, number)

    def __str__(self) -> str:
        return f"{self.name} {self.level:g}"

    def of(self, image: Image.Image, *, seed: int, key: str) -> Image.Image:
        """The perturbed image; `key` is what it is drawn for, such as the sample's id."""
        digest = hashlib.sha256(f"{seed}\0{self.name}\0{self.level!r}\0{key}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:16], "big"))
        return PERTURBATIONS[self.name].done(image, self.level, rng)

    def sample(self, sample: Sample, *, seed: int) -> Sample:
        """The sample with each of its images perturbed.

        Raises:
            InputError: an image cannot be read.
        """
        images = [
            self.of(image, seed=seed, key=f"{sample.id}\0{k}")
            for k, image in enumerate(open_images(sample))
        ]
        return replace(sample, image=images[0] if len(images) == 1 else tuple(images))


def all_perturbations() -> list[Perturbation]:
    """Every kind at each of its levels."""
    return [
        Perturbation(name, level) for name, kind in PERTURBATIONS.items() for level in kind.levels
    ]


def parsed_perturbations(names: Sequence[str]) -> list[Perturbation]:
    """`["jpeg:20", "blur"]`; a name alone is every level of its kind.

    Raises:
        InputError: one is unknown, out of range, or stands twice.
    """
    parsed: list[Perturbation] = []
    for name in names:
        if name in PERTURBATIONS:
            parsed += [Perturbation(name, level) for level in PERTURBATIONS[name].levels]
        else:
            parsed.append(Perturbation.parse(name))
    if len(set(parsed)) < len(parsed):
        raise InputError("a perturbation is named twice")
    return parsed


def _gaussian(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float32)
    noise = rng.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(np.clip(pixels + 255 * level * noise, 0, 255).round().astype(np.uint8))


def _salt(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    pixels = np.array(image)
    drawn = rng.random(pixels.shape[:2])
    pixels[drawn < level / 2] = 0
    pixels[(drawn >= level / 2) & (drawn < level)] = 255
    return Image.fromarray(pixels)


def _jpeg(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=int(level))
    with Image.open(buffer) as read:
        return read.convert("RGB")


def _blur(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(level * max(image.size)))


def _crop(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    width, height = (max(1, round(level * side)) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _resize(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    width, height = (max(1, round(level * side)) for side in image.size)
    small = image.resize((width, height), Image.Resampling.BILINEAR)
    return small.resize(image.size, Image.Resampling.BILINEAR)


def _contrast(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(level)


PERTURBATIONS: dict[str, _Kind] = {
    "gaussian": _Kind((0.05, 0.1, 0.2), 0.0, 1.0, _gaussian),
    "salt": _Kind((0.01, 0.05, 0.1), 0.0, 1.0, _salt),
    "jpeg": _Kind((50, 20, 5), 1, 95, _jpeg),
    "blur": _Kind((0.005, 0.01, 0.03), 0.0, 1.0, _blur),
    "crop": _Kind((0.9, 0.75, 0.5), 0.05, 1.0, _crop),
    "resize": _Kind((0.5, 0.25, 0.1), 0.01, 1.0, _resize),
    "contrast": _Kind((0.5, 0.25, 2.0), 0.0, 10.0, _contrast),
}
"""Kinds of perturbation by name."""
