"""Pictures of any origin as RGB images: the one image reader of the package.

A picture is opened as a person sees it: upright by its EXIF orientation, transparent parts on
white, the first frame of an animation, and all grey levels of 16-bit and float images scaled to
8 bits.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from PIL import Image, UnidentifiedImageError

from cmrm.errors import InputError
from cmrm.prompts.text import shortened

Picture = Image.Image | Path | str | bytes
"""A PIL image, the path of an image file, a `data:` URI, or the content of an image file."""

MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded."""

_ORIENTATION = 0x0112
"""The EXIF tag."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what turns the image upright."""
_SIGNATURES = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8|RIFF....WEBP|BM|II\*\0|MM\0\*|....ftyp", re.DOTALL
)
"""How files of the usual image formats begin."""
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{40,}={0,2}")
_GREY_STEPS = {"L;2": 85, "L;4": 17}
"""PNG raw mode -> distance of two grey levels after Pillow has spread them over 8 bits."""


def open_picture(image: Picture, owner: str) -> Image.Image:
    """One picture as an RGB image, upright, with transparent parts on white.

    Nothing is fetched from the network. The image that is returned carries no EXIF.

    Args:
        image: a PIL image, a path, a `data:` URI, or the bytes of an image file.
        owner: whose picture it is, such as `sample 'a'`; messages begin with it.

    Raises:
        InputError: the file is missing, broken, or of an unknown kind; the image is too large or
            has no pixels; its values have no known scale; or `image` is of another type.
    """
    if not isinstance(image, Image.Image):
        return _decoded(*_image_file(image, owner), owner)
    try:
        return _upright_rgb(image, owner, "its image")
    except Exception as error:  # decoders raise classes of every kind
        _refuse(error, owner, "its image")


def image_digest(image: Image.Image) -> str:
    """Hex sha256 over the size and the RGB pixels of an opened image."""
    rgb = image if image.mode == "RGB" else open_picture(image, "an image")
    digest = hashlib.sha256(f"{rgb.width} x {rgb.height}\0".encode())
    digest.update(rgb.tobytes())
    return digest.hexdigest()


_DIGESTS: dict[bytes, str] = {}
"""sha256 of the content of an image file -> `image_digest`.

The content is the key, so a digest cannot be out of date, and a file is decoded once."""


def picture_digest(image: Picture, owner: str) -> str:
    """`image_digest` of a picture; the same file content is decoded once in this process.

    Raises:
        InputError: as `open_picture`.
    """
    if isinstance(image, Image.Image):
        return image_digest(open_picture(image, owner))
    source, name = _image_file(image, owner)
    try:
        content = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        _refuse(error, owner, name)
    key = hashlib.sha256(content).digest()
    if key not in _DIGESTS:
        _DIGESTS[key] = image_digest(_decoded(content, name, owner))
    return _DIGESTS[key]


def is_data_uri(text: str) -> bool:
    """Whether `text` begins as a `data:` URI does."""
    return text[:5].lower() == "data:"


def decode_data_uri(uri: str, owner: str) -> bytes:
    """The content of a `data:` URI, in base64 or percent-encoded.

    Raises:
        InputError: it has no comma, or its base64 is broken.
    """
    header, comma, payload = uri.partition(",")
    if not comma:
        raise InputError(f"{owner}: its data URI cannot be read: it has no comma")
    if not header.lower().rstrip().endswith("base64"):
        return base64_image(payload) or unquote_to_bytes(payload)
    try:
        return _from_base64("".join(unquote(payload).split()))
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{owner}: its data URI cannot be read: {shortened(error)}") from None


def base64_image(text: str) -> bytes | None:
    """The image file that a bare base64 text holds; None where the text is something else.

    A text counts as base64 when the bytes begin as an image file does and Pillow takes their
    header, so that a path is not mistaken for it.
    """
    compact = "".join(text.split())
    if not _BASE64.fullmatch(compact):
        return None
    try:
        if not _SIGNATURES.match(_from_base64(compact[:20])):
            return None
        content = _from_base64(compact)
        with Image.open(io.BytesIO(content)):
            return content
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return content
    except Exception:  # Pillow's formats raise classes of every kind for a header that is none
        return None


def array_picture(values: np.ndarray[Any, Any], owner: str) -> Image.Image:
    """A PIL image of an array [H, W] or [H, W, C] with 1 (grey), 2 (grey, alpha), 3 or 4 channels.

    Values are bool, uint8, uint16, other integers (0..255 or 0..65535), or floats (0..1, 0..255
    or 0..65535).

    Raises:
        InputError: the shape, the type or the scale is another one, or there are too many pixels.
    """
    channels = values.shape[2] if values.ndim == 3 else 1
    if values.ndim not in {2, 3} or channels not in {1, 2, 3, 4} or values.dtype.kind not in "buif":
        raise InputError(
            f"{owner}: its image is an array of shape {shortened(values.shape)} and type "
            f"{shortened(values.dtype)}; expected numbers [height, width] or [height, width, 1..4]"
        )
    _check_size((values.shape[1], values.shape[0]), owner, "its image")
    pixels = _eight_bit(values, owner, "its image")
    if pixels.ndim == 3 and channels == 1:
        pixels = pixels[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(pixels))


def _image_file(image: Picture, owner: str) -> tuple[bytes | Path, str]:
    """(content or path of an image file, its name in messages)."""
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image), "its image"
    if isinstance(image, str) and is_data_uri(image):
        return decode_data_uri(image, owner), "its data URI"
    if isinstance(image, str) and "://" in image:
        raise InputError(
            f"{owner}: {shortened(image)} would have to be fetched; give a file or a data URI"
        )
    if not isinstance(image, str | Path):
        raise InputError(
            f"{owner}: its image is {type(image).__name__}; expected a PIL image, a path, a data "
            "URI, or the bytes of an image file"
        )
    path, name = Path(image), shortened(image)
    if not os.path.isfile(path):  # False, not an error, for a name that no file can have
        state = f"{name} is no file" if os.path.exists(path) else f"there is no image at {name}"
        raise InputError(f"{owner}: {state}")
    return path, name


def _from_base64(text: str) -> bytes:
    """Bytes of base64 in the usual or the URL alphabet, with or without padding."""
    plain = text.translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")
    return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)


def _decoded(source: bytes | Path, name: str, owner: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _upright_rgb(image, owner, name)
    except Exception as error:  # decoders raise classes of every kind
        _refuse(error, owner, name)


def _refuse(error: Exception, owner: str, name: str) -> NoReturn:
    """Raise the `InputError` for whatever a decoder raised: Pillow has no base class for it."""
    if isinstance(error, InputError):
        raise error
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        raise InputError(f"{owner}: {name} is too large to be opened safely") from None
    if isinstance(error, UnidentifiedImageError):
        reason = "its format is unknown"
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    else:
        reason = shortened(str(error) or type(error).__name__, 100)
    raise InputError(f"{owner}: {name} cannot be read as an image: {reason}") from None


def _check_size(size: tuple[int, int], owner: str, name: str) -> None:
    width, height = size
    if width * height == 0:
        raise InputError(f"{owner}: {name} has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{owner}: {name} is too large to be opened safely: {width} x {height} pixels, at most "
            f"{MAX_PIXELS} are read"
        )


def _upright_rgb(image: Image.Image, owner: str, name: str) -> Image.Image:
    _check_size(image.size, owner, name)
    transparent = _transparent_colour(image)
    image.load()
    _check_size(image.size, owner, name)  # some containers name another size than they hold
    if image.mode == "F" or image.mode.startswith("I"):
        rgb = _grey_rgb(image, transparent, owner, name)
    elif image.has_transparency_data:
        if transparent != image.info.get("transparency"):
            image = image.copy()
            image.info["transparency"] = transparent
        straight = image.convert("LA") if image.mode == "La" else image  # no way from La to RGBA
        rgba = straight.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        rgb = Image.alpha_composite(white, rgba).convert("RGB")
    else:
        rgb = image.convert("RGB")
    turn = _UPRIGHT.get(_orientation(image))
    if turn is not None:
        rgb = rgb.transpose(turn)
    rgb.info = {}
    return rgb


def _orientation(image: Image.Image) -> Any:
    """EXIF orientation; 1 (upright) where the EXIF is broken: the pixels are whole without it."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # the parsers of EXIF and XMP raise classes of every kind
        return 1


def _transparent_colour(image: Image.Image) -> Any:
    """The transparent colour or palette entries in the units of the decoded pixels, or None.

    Pillow leaves the colour of a PNG in the units of the file, which has 2, 4 or 16 bits a channel.
    """
    colour = image.info.get("transparency")
    if isinstance(colour, tuple) and any(level > 255 for level in colour):
        return tuple(level >> 8 for level in colour)
    if isinstance(colour, int) and image.mode == "L":
        raw = {str(tile[3]) for tile in getattr(image, "tile", [])}
        return colour * next((step for mode, step in _GREY_STEPS.items() if mode in raw), 1)
    return colour


def _grey_rgb(image: Image.Image, transparent: Any, owner: str, name: str) -> Image.Image:
    """An RGB image of a grey one with 16 or 32 bits a pixel."""
    values = np.asarray(image)
    pixels = _eight_bit(values, owner, name)
    if isinstance(transparent, int):
        pixels = np.where(values == transparent, np.uint8(255), pixels)
    return Image.fromarray(pixels).convert("RGB")


def _eight_bit(values: np.ndarray[Any, Any], owner: str, name: str) -> np.ndarray[Any, Any]:
    """`values` scaled to uint8, same shape.

    uint16 holds 0..65535. Other integers hold 0..255 where none is larger, else 0..65535. Floats
    hold 0..1 where none is larger, else the same.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    low, high = float(values.min()), float(values.max())
    floats = values.dtype.kind == "f"
    if not (low >= 0.0 and high <= 65535.0) or (floats and 1.0 < high < 2.0):
        raise InputError(
            f"{owner}: {name} has values from {low:g} to {high:g}, whose scale is unknown; scale "
            "them to 0..1, 0..255 or 0..65535"
        )
    wide = values.astype(np.float32)
    if floats and high <= 1.0:
        wide *= 255
    elif high > 255.0 or values.dtype.newbyteorder("=") == np.uint16:
        wide /= 257
    return np.rint(wide).astype(np.uint8)


def data_uri(image: Image.Image) -> str:
    """A `data:` URI with the image as PNG, which loses nothing."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
