"""Samples: a query, its image, its caption. Images are opened here, and only here."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageOps, UnidentifiedImageError

from cmrm.errors import InputError

Picture = Image.Image | Path | str | bytes
"""A PIL image, the path of an image file, or such a file's content."""

Match = Literal["exact", "letter", "yes_no", "judge"]
"""`exact`: case, white space and a final full stop aside; `letter`: the option's letter that the reply begins with; `yes_no`: the
first sentence says yes or no; `judge`: a judge rates the reply beside the answer."""


@dataclass(frozen=True)
class Sample:
    """One request to a VLM."""

    id: str
    """Unique within its set; seeds the noise of the `noise` condition and decides the split."""
    query: str
    """The request as text."""
    image: Picture | tuple[Picture, ...] | None = None
    """The image it is asked about, or a tuple of several. None: the sample has only text conditions."""
    caption: str | None = None
    """The image told in words, for the `caption` condition."""
    category: str | None = None
    """Harm category or topic, for stratified tables."""
    label: str | None = None
    """What the sample is: `harmful`, `benign`, or a set's own word."""
    answer: str | None = None
    """The reference answer, where the set has one."""
    image_last: bool = False
    """Put the image behind the query instead of before it."""
    match: Match = "exact"
    """How a reply is compared with `answer`."""
    context: str | None = None
    """What a judge that sees no image is told of it."""


def open_images(sample: Sample) -> tuple[Image.Image, ...]:
    """The sample's images as RGB, upright according to their EXIF orientation; at least one.

    Raises:
        InputError: the sample has no image, or the file is missing, broken or too large to be opened safely.
    """
    if sample.image is None:
        raise InputError(f"sample {sample.id!r} has no image; give it one, or use the text-only conditions")
    held = sample.image if isinstance(sample.image, tuple) else (sample.image,)
    if not held:
        raise InputError(f"sample {sample.id!r} has an empty tuple of images; give it one, or None")
    return tuple(open_picture(image, f"sample {sample.id!r}") for image in held)


def open_picture(image: Picture, whose: str) -> Image.Image:
    """One image as RGB, upright according to its EXIF orientation; `whose` begins an error's message.

    Raises:
        InputError: the file is missing, broken or too large to be opened safely.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    path = "its image" if isinstance(image, bytes) else Path(image)
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else path) as opened:
            upright = ImageOps.exif_transpose(opened)
            return upright.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{whose}: there is no image at {path}") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{whose}: {path} is too large to be opened safely: {error}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{whose}: {path} cannot be read as an image: {error}") from None


def check_unique(samples: Sequence[Sample]) -> None:
    """Raise `InputError` when two samples share an id: seeds, splits and results hang on it."""
    members = SetHash()
    for sample in samples:
        members.add(sample)


def split_by_hash(samples: Iterable[Sample], share: float, *, salt: str = "cmrm") -> tuple[list[Sample], list[Sample]]:
    """Split into (first part, rest), the first with about `share` of the samples.

    A sample's side depends on its id and `salt` alone, so it stays when the set grows or is put in another order.

    Raises:
        InputError: `share` is not within 0..1.
    """
    if not 0.0 <= share <= 1.0:
        raise InputError(f"share is {share}; it is a part of the whole, between 0 and 1")
    first: list[Sample] = []
    rest: list[Sample] = []
    for sample in samples:
        digest = hashlib.sha256(f"{salt}\x00{sample.id}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        (first if place < share else rest).append(sample)
    return first, rest


class SetHash:
    """Identifies a set of samples by ids and queries, whatever their order, one sample at a time.

    The sum of the samples' sha256 digests modulo 2^256. Also refuses a repeated id: seeds, splits and results hang on ids.
    """

    def __init__(self) -> None:
        self.value = 0
        self.count = 0
        self._seen: set[int] = set()

    def add(self, sample: Sample) -> None:
        """Take in one more sample.

        Raises:
            InputError: a sample of this id was taken in before.
        """
        key = int.from_bytes(hashlib.sha256(sample.id.encode()).digest()[:8], "big")
        if key in self._seen:
            raise InputError(f"two samples have the id {sample.id!r}; ids must be unique within a set")
        self._seen.add(key)
        digest = hashlib.sha256(f"{sample.id}\x00{sample.query}".encode()).digest()
        self.value = (self.value + int.from_bytes(digest, "big")) % 2**256
        self.count += 1

    def hexdigest(self) -> str:
        """64 hex digits."""
        return f"{self.value:064x}"


def set_hash(samples: Iterable[Sample]) -> str:
    """`SetHash` of all of `samples`."""
    found = SetHash()
    for sample in samples:
        found.add(sample)
    return found.hexdigest()
