"""A sample: what is asked, its images, and its content identity."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from cmrm.errors import InputError
from cmrm.prompts.images import Picture, open_picture, picture_digest
from cmrm.prompts.text import normalised, shortened

Match = Literal["exact", "letter", "yes_no", "judge"]
"""How a reply is compared with the answer.

`exact`: equal, apart from case, white space and a final full stop. `letter`: the reply begins with
the option's letter. `yes_no`: the first sentence says yes or no. `judge`: a judge rates the reply
beside the answer."""


@dataclass(frozen=True)
class Sample:
    """One request to a VLM."""

    id: str
    """Unique within its set; seeds the noise of the `noise` condition."""
    query: str
    """The request as text."""
    image: Picture | tuple[Picture, ...] | None = None
    """The image it is asked about, or a tuple of several. None: the sample is text only."""
    caption: str | None = None
    """A description of the image, for the `caption` condition."""
    category: str | None = None
    """Harm category or topic, for tables by category."""
    label: str | None = None
    """`harmful`, `benign`, or a set's own word."""
    answer: str | None = None
    """The reference answer, where the set has one."""
    image_last: bool = False
    """Whether the image stands after the query instead of before it."""
    match: Match = "exact"
    """How a reply is compared with `answer`."""
    context: str | None = None
    """A description of the image for a judge that sees none."""

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The images, unopened; empty for a sample without."""
        if self.image is None:
            return ()
        return self.image if isinstance(self.image, tuple) else (self.image,)

    @property
    def owner(self) -> str:
        """The sample's name in messages."""
        return f"sample {shortened(self.id)!r}"


def open_images(sample: Sample) -> tuple[Image.Image, ...]:
    """The sample's images as RGB, at least one; see `images.open_picture`.

    Raises:
        InputError: the sample has no image, or one cannot be opened.
    """
    _check_pictures(sample)
    return tuple(open_picture(picture, sample.owner) for picture in sample.pictures)


def image_digests(sample: Sample) -> tuple[str, ...]:
    """`images.image_digest` of each of the sample's images, at least one.

    Raises:
        InputError: the sample has no image, or one cannot be opened.
    """
    _check_pictures(sample)
    return tuple(picture_digest(picture, sample.owner) for picture in sample.pictures)


def content_key(sample: Sample) -> str:
    """The content identity of a sample: hex sha256 over its normalised query and its images.

    Two samples with the same key ask the same, whatever their ids, their spelling of white space
    and case, and the format of their image files.

    Raises:
        InputError: an image cannot be opened.
    """
    digests = image_digests(sample) if sample.pictures else ()
    content = "\0".join((normalised(sample.query), *digests))
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def _check_pictures(sample: Sample) -> None:
    if sample.image is None:
        raise InputError(
            f"{sample.owner} has no image; give it one, or use the text-only conditions"
        )
    if not sample.pictures:
        raise InputError(f"{sample.owner} has an empty tuple of images; give it one, or None")
