"""The one image reader: modes, EXIF, transparency, scales, limits, broken input, digests."""

from __future__ import annotations

import base64
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from cmrm.errors import InputError
from cmrm.prompts import images as reader
from cmrm.prompts.images import (
    array_picture,
    base64_image,
    image_digest,
    open_picture,
    picture_digest,
)

ORIENTATION = 0x0112
LETTER = np.zeros((12, 16), np.uint8)
LETTER[3:9, 4:8] = 255
"""Alpha: opaque where a letter stands."""


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def picture(width: int = 9, height: int = 6) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def opened(image: Any) -> np.ndarray:
    return np.asarray(open_picture(image, "sample 'a'"))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, trns: bytes) -> bytes:
    """A PNG file of raw scan lines, each after its filter byte."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    transparent = chunk(b"tRNS", trns) if trns else b""
    body = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + transparent + body + chunk(b"IEND", b"")


# Modes


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = picture().convert(mode)
    assert (opened(image) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("modes", [["RGBA"], ["RGBA", "RGBa"], ["LA"], ["LA", "La"], ["PA"]])
def test_an_opaque_alpha_channel_changes_nothing(modes: list[str]) -> None:
    image = picture()
    for mode in modes:
        image = image.convert(mode)
    straight = image.convert("LA") if image.mode == "La" else image
    assert (opened(image) == np.asarray(straight.convert("RGB"))).all()


def test_an_rgb_image_keeps_its_pixels_and_is_a_copy() -> None:
    image = picture()
    copy = open_picture(image, "x")
    assert copy.tobytes() == image.tobytes()
    copy.putpixel((0, 0), (1, 2, 3))
    assert image.tobytes() == picture().tobytes()


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (opened(content) == (255, 0, 0)).all(), kind


# EXIF


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_files_and_pil_images_upright(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "turned.png"
    picture().save(path, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert (opened(path) == expected).all()
    assert (opened(path.read_bytes()) == expected).all()
    with Image.open(path) as image:
        assert (opened(image) == expected).all()
        assert (opened(image.convert("RGBA")) == expected).all()


def test_an_image_is_turned_once() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    content = encoded(picture(), "TIFF", exif=exif)
    upright = open_picture(content, "x")
    assert upright.size == (6, 9)
    assert open_picture(upright, "x").tobytes() == upright.tobytes()


def test_broken_exif_leaves_the_pixels_as_they_are() -> None:
    image = picture()
    image.info["exif"] = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff broken"
    assert (opened(image) == np.asarray(picture())).all()


# Transparency


def transparent_pictures() -> dict[str, Any]:
    """Black letters on a transparent ground, in every form that Pillow knows."""
    black = Image.new("L", (16, 12), 0)
    alpha = Image.fromarray(LETTER)
    rgba = Image.merge("RGBA", (black, black, black, alpha))
    grey = Image.merge("LA", (black, alpha))
    palette = Image.fromarray(LETTER // 255).convert("P")
    palette.putpalette([0, 0, 0, 0, 0, 0] + [0] * 762)
    ground = Image.fromarray(np.where(LETTER, 0, 9).astype(np.uint8))
    bits = bytes(b"".join(b"\0" + np.packbits(row == 0).tobytes() for row in LETTER))
    nibbles = b"".join(
        b"\0" + bytes(int(row[k] == 0) << 4 | int(row[k + 1] == 0) for k in range(0, 16, 2))
        for row in LETTER
    )
    wide = b"".join(b"\0" + np.where(row, 0, 700).astype(">u2").tobytes() for row in LETTER)
    wide_rgb = b"".join(
        b"\0" + np.repeat(np.where(row, 0, 0x4000), 3).astype(">u2").tobytes() for row in LETTER
    )
    handed = ground.convert("RGB")
    handed.info["transparency"] = (9, 9, 9)
    return {
        "RGBA": rgba,
        "LA": grey,
        "RGBa": rgba.convert("RGBa"),
        "La": grey.convert("La"),
        "PA": rgba.convert("PA"),
        "RGB with a transparent colour": handed,
        "RGBA PNG": encoded(rgba),
        "LA PNG": encoded(grey),
        "P PNG, one entry": encoded(palette, transparency=0),
        "P PNG, an alpha for each entry": encoded(palette, transparency=b"\0\xff"),
        "L PNG": encoded(ground, transparency=9),
        "RGB PNG": encoded(ground.convert("RGB"), transparency=(9, 9, 9)),
        "1 bit PNG": png(16, 12, 1, 0, bits, b"\0\1"),
        "4 bit PNG": png(16, 12, 4, 0, nibbles, b"\0\1"),
        "16 bit grey PNG": png(16, 12, 16, 0, wide, struct.pack(">H", 700)),
        "16 bit RGB PNG": png(16, 12, 16, 2, wide_rgb, struct.pack(">HHH", *[0x4000] * 3)),
        "GIF": encoded(palette, "GIF", transparency=0),
        "WebP": encoded(rgba, "WEBP", lossless=True),
        "TIFF": encoded(rgba, "TIFF"),
    }


@pytest.mark.parametrize("kind", transparent_pictures())
def test_transparency_lies_on_white(kind: str) -> None:
    pixels = opened(transparent_pictures()[kind])
    assert (pixels == np.where(LETTER, 0, 255)[..., None]).all()


def test_half_transparent_is_mixed_with_white() -> None:
    assert tuple(opened(Image.new("RGBA", (1, 1), (255, 0, 0, 128)))[0, 0]) == (255, 127, 127)


# Scales


RAMP = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(RAMP),
        Image.fromarray(RAMP.astype(">u2")),
        Image.fromarray(RAMP.astype(np.int32)),
        Image.fromarray((RAMP / 65535).astype(np.float32)),
        Image.fromarray((RAMP / 257).astype(np.float32)),
        encoded(Image.fromarray(RAMP)),
        encoded(Image.fromarray(RAMP), "TIFF"),
        encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
        encoded(Image.fromarray((RAMP / 65535).astype(np.float32)), "TIFF"),
    ],
    ids=["I;16", "I;16B", "I", "F 0..1", "F 0..255", "PNG", "TIFF", "TIFF I", "TIFF F"],
)
def test_a_ramp_of_many_bits_stays_a_ramp(image: Any) -> None:
    pixels = opened(image)
    assert (pixels == np.arange(256)[None, :, None]).all()


def test_an_eight_bit_image_in_a_wider_mode_keeps_its_levels() -> None:
    grey = picture().convert("L")
    for mode in ("I", "F"):
        assert (opened(grey.convert(mode)) == np.asarray(grey)[..., None]).all(), mode


@pytest.mark.parametrize(
    "values", [[-1.0, 3.0], [float("nan"), 0.5], [0.0, 70000.0], [0.0, float("inf")], [0.0, 1.2]]
)
def test_values_of_unknown_scale_are_refused(values: list[float]) -> None:
    image = Image.fromarray(np.array([values], dtype=np.float32))
    with pytest.raises(InputError, match=r"^sample 'a': .*whose scale is unknown"):
        opened(image)


def test_integers_of_unknown_scale_are_refused() -> None:
    for value in (-5, 70_000):
        with pytest.raises(InputError, match="scale is unknown"):
            opened(Image.fromarray(np.array([[value, 0]], dtype=np.int32)))


# Arrays


@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize("kind", ["uint8", "bool", "uint16", "int64", "float32", "float64"])
def test_arrays_become_pictures(kind: str, channels: int | None) -> None:
    shape = (2, 3) if channels is None else (2, 3, channels)
    top: dict[str, float] = {"uint8": 255, "bool": 1, "uint16": 65535, "int64": 255}
    values = np.full(shape, top.get(kind, 1.0)).astype(kind)
    values[0] = 0
    pixels = opened(array_picture(values, "x"))
    assert (pixels[0] == 0).all()
    assert (pixels[1] == 255).all()


def test_an_array_with_alpha_lies_on_white() -> None:
    values = np.zeros((2, 2, 4), np.uint8)
    assert (opened(array_picture(values, "x")) == 255).all()


@pytest.mark.parametrize(
    "values",
    [np.zeros(3), np.zeros((1, 2, 5)), np.zeros((2, 2), complex), np.zeros((2, 2), object),
     np.zeros((0, 4)), np.zeros((1, 2, 3, 3), np.uint8)],
)  # fmt: skip
def test_arrays_of_another_kind_are_refused(values: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"^x: its image"):
        array_picture(values, "x")


# Limits


def test_a_large_image_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    header_only = png(20_000, 20_000, 8, 0, b"", b"")
    with pytest.raises(InputError, match=r"too large to be opened safely: 20000 x 20000 pixels"):
        opened(header_only)


def test_a_large_pil_image_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_PIXELS", 99)
    assert opened(Image.new("RGB", (9, 11))).shape == (11, 9, 3)
    with pytest.raises(InputError, match="too large"):
        opened(Image.new("RGB", (10, 10)))
    with pytest.raises(InputError, match="too large"):
        array_picture(np.zeros((10, 10)), "x")


def test_pillow_s_own_limit_gives_the_same_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "big.png"
    Image.new("RGB", (100, 100)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="too large to be opened safely"):
        opened(path)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_an_image_without_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="has no pixels"):
        opened(Image.new("RGB", size))


# Broken input


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n broken", b"BM" * 40])
def test_broken_content(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    for source in (content, tmp_path / "a.png", str(tmp_path / "a.png")):
        with pytest.raises(InputError, match=r"^sample 'a': .* cannot be read as an image: "):
            opened(source)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated_content(kind: str) -> None:
    content = encoded(picture(64, 64), kind)
    with pytest.raises(InputError, match="cannot be read as an image"):
        opened(content[: len(content) // 2])


def test_a_closed_image_is_refused(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        pass
    with pytest.raises(InputError, match="its image cannot be read"):
        opened(image)


def test_nothing_at_the_path(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", "a\0b.png", "x" * 5000):
        with pytest.raises(InputError, match="there is no image at"):
            opened(path)
    with pytest.raises(InputError, match="is no file"):
        opened(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes by name on this system")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="is no file"):
        opened(tmp_path / "pipe.png")


@pytest.mark.parametrize("image", [3, 2.5, None, object(), ["a.png"], {"path": "a.png"}])
def test_odd_types_are_named(image: Any) -> None:
    with pytest.raises(InputError, match=rf"its image is {type(image).__name__}; expected"):
        opened(image)


def test_nothing_is_fetched() -> None:
    with pytest.raises(InputError, match=r"would have to be fetched; give a file or a data URI"):
        opened("https://example.org/a.png")


@pytest.mark.parametrize("make", [str, lambda text: f"data:image/png;base64,{text}", Path])
def test_an_error_never_prints_the_image(make: Callable[[str], Any]) -> None:
    text = base64.b64encode(bytes(range(256)) * 400).decode()
    with pytest.raises(InputError) as caught:
        opened(make(text))
    assert len(str(caught.value)) < 200


# Data URIs and base64


def test_data_uris() -> None:
    content = encoded(picture())
    text = base64.b64encode(content).decode()
    wrapped = "\n".join(text[k : k + 76] for k in range(0, len(text), 76))
    quoted = "".join(f"%{byte:02X}" for byte in content)
    for uri in (
        f"data:image/png;base64,{text}",
        f"DATA:image/png;charset=x;base64,{wrapped}",
        f"data:;base64,{text.replace('+', '%2B').replace('=', '')}",
        f"data:image/png,{quoted}",
        f"data:image/png,{text}",
    ):
        assert (opened(uri) == np.asarray(picture())).all()


@pytest.mark.parametrize(
    "uri", ["data:", "data:image/png;base64", "data:image/png;base64,A", "data:x;base64,*?"]
)
def test_broken_data_uris(uri: str) -> None:
    with pytest.raises(InputError, match=r"^sample 'a': its data URI cannot be read"):
        opened(uri)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_base64_of_an_image_is_recognised(kind: str) -> None:
    content = encoded(picture(), kind)
    assert base64_image(base64.b64encode(content).decode()) == content
    assert base64_image(base64.urlsafe_b64encode(content).decode().rstrip("=")) == content


@pytest.mark.parametrize(
    "text",
    ["", "a.png", "images/train/000001.jpg", "/9j/images/of/another/machine/number/0001/and/more",
     "iVBORw0KGgo" + "A" * 60, "R0lGOD/" + "a" * 60, "A" * 4000],
)  # fmt: skip
def test_a_path_is_not_base64(text: str) -> None:
    assert base64_image(text) is None


# Digests


def test_the_digest_is_of_the_pixels() -> None:
    image = picture()
    copies = [encoded(image, kind) for kind in ("PNG", "BMP", "TIFF")]
    assert {picture_digest(copy, "x") for copy in copies} == {image_digest(image)}
    assert image_digest(Image.new("RGB", (4, 6))) != image_digest(Image.new("RGB", (6, 4)))
    assert image_digest(picture(9, 5)) != image_digest(image)


def test_a_file_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(17, 13).save(tmp_path / "a.png")
    decoded: list[Any] = []

    def counted(image: Image.Image) -> str:
        decoded.append(image)
        return image_digest(image)

    monkeypatch.setattr(reader, "image_digest", counted)
    monkeypatch.setattr(reader, "_DIGESTS", {})
    first = picture_digest(tmp_path / "a.png", "x")
    assert first == picture_digest(str(tmp_path / "a.png"), "x")
    assert first == picture_digest((tmp_path / "a.png").read_bytes(), "x")
    assert len(decoded) == 1


def test_the_digest_follows_a_file_of_the_same_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "a.bmp"
    Image.new("RGB", (8, 8), "red").save(path)
    before, state = picture_digest(path, "x"), path.stat()
    Image.new("RGB", (8, 8), "blue").save(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert path.stat().st_size == state.st_size
    assert picture_digest(path, "x") == image_digest(Image.new("RGB", (8, 8), "blue")) != before
