"""Samples: their images, and their content identity."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cmrm import Sample
from cmrm.errors import InputError
from cmrm.prompts.sample import content_key, open_images
from cmrm.prompts.text import normalised, shortened

RED, BLUE = (Image.new("RGB", (8, 6), colour) for colour in ("red", "blue"))


def test_several_images_in_their_order() -> None:
    images = open_images(Sample("a", "q", (RED, BLUE)))
    assert [image.getpixel((0, 0)) for image in images] == [(255, 0, 0), (0, 0, 255)]


def test_a_sample_without_images() -> None:
    with pytest.raises(InputError, match=r"sample 'a' has no image; give it one"):
        open_images(Sample("a", "q"))
    with pytest.raises(InputError, match=r"sample 'a' has an empty tuple of images"):
        open_images(Sample("a", "q", ()))


def test_a_long_id_is_shortened_in_messages() -> None:
    with pytest.raises(InputError) as caught:
        open_images(Sample("x" * 10_000, "q"))
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "query",
    ["How do I?", "  how DO\ti? \n", "How\u00a0do\u2003I?", "\uff28ow do I?", "how  do  i?"],
)
def test_spelling_does_not_change_the_content(query: str) -> None:
    assert content_key(Sample("b", query, RED)) == content_key(Sample("a", "How do I?", RED))


def test_the_format_of_the_image_does_not_change_the_content(tmp_path: Path) -> None:
    RED.save(tmp_path / "red.png")
    stream = io.BytesIO()
    RED.save(stream, "BMP")
    pictures = (RED, tmp_path / "red.png", str(tmp_path / "red.png"), stream.getvalue())
    assert len({content_key(Sample("a", "q", picture)) for picture in pictures}) == 1


def test_query_images_and_their_order_are_the_content() -> None:
    samples = [
        Sample("a", "q"), Sample("a", "q", RED), Sample("a", "q", BLUE), Sample("a", "r", RED),
        Sample("a", "q", (RED, BLUE)), Sample("a", "q", (BLUE, RED)),
    ]  # fmt: skip
    assert len({content_key(sample) for sample in samples}) == len(samples)


def test_the_content_follows_a_changed_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    RED.save(path)
    before = content_key(Sample("a", "q", path))
    BLUE.save(path)
    assert content_key(Sample("a", "q", path)) != before


@given(st.text(st.characters(codec=None), max_size=30))
def test_any_query_has_a_normal_form(query: str) -> None:
    once = normalised(query)
    assert normalised(f"\n{query}  ") == once
    assert len(content_key(Sample("a", query))) == 64


@given(st.text(st.characters(codec=None)), st.integers(10, 80))
def test_short_forms_are_short_and_printable(text: str, limit: int) -> None:
    short = shortened(text, limit)
    assert len(short) <= limit
    assert short.isprintable()
    assert "\n" not in short
