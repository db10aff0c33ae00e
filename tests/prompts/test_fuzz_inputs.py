"""Random damage to tables and images: samples, or one short error, and nothing else.

`CMRM_FUZZ` is the number of cases, 10,000 when unset.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cmrm import Sample
from cmrm.errors import InputError, MissingExtraError
from cmrm.prompts import load_samples, refuse_unratable
from cmrm.prompts.columns import parse_columns
from cmrm.prompts.images import array_picture
from cmrm.prompts.loading import rows_to_samples
from cmrm.prompts.sample import content_key, open_images
from cmrm.prompts.splits import refuse_leaks, split_by_content
from layouts import LAYOUTS, put

CASES = int(os.environ.get("CMRM_FUZZ", "10000"))
LONGEST = 600
"""Characters of an error."""

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow warns of much that is broken


def checked(work: Callable[[], Any], case: object) -> bool:
    """Whether `work` succeeds; an error other than one short line fails the test."""
    try:
        work()
    except (InputError, MissingExtraError) as error:
        message = str(error)
        assert len(message) < LONGEST, (case, message[:LONGEST])
        assert "\n" not in message, (case, message)
        message.encode()
        return False
    except Exception as error:
        raise AssertionError(f"case {case}: {type(error).__name__}: {error}") from error
    return True


def damaged(content: bytes, generator: random.Random, words: list[bytes]) -> bytes:
    """`content` with a few bytes cut, doubled, replaced by a word, or (at times) changed."""
    data = bytearray(content)
    changes = generator.choice((4, 6))
    for _ in range(generator.choice((1, 1, 1, 2, 4, 16))):
        at = generator.randrange(len(data) + 1)
        end = min(len(data), at + generator.choice((0, 1, 1, 2, 8, 64)))
        change = generator.randrange(changes)
        if change in {0, 1}:
            data[at:end] = generator.choice(words)
        elif change == 2:
            del data[at:end]
        elif change == 3:
            data[at:at] = data[at:end]
        elif change == 4:
            data[at:end] = generator.randbytes(end - at)
        elif at < len(data):
            data[at] ^= 1 << generator.randrange(8)
    return bytes(data[: generator.choice((len(data), len(data), at))])


# Images


def image_files() -> list[bytes]:
    generator = random.Random(0)
    pixels = bytes(generator.randrange(256) for _ in range(12 * 9 * 4))
    rgba = Image.frombytes("RGBA", (12, 9), pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x9286] = "comment"
    palette = rgba.convert("RGB").quantize(16)
    deep = Image.frombytes("I;16", (12, 9), pixels[: 12 * 9 * 2])
    versions: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (rgba, "PNG", {"exif": exif}),
        (palette, "PNG", {"transparency": b"\0\x80\xff"}),
        (rgba.convert("L"), "PNG", {"transparency": 7}),
        (deep, "PNG", {}),
        (rgba.convert("RGB"), "JPEG", {"exif": exif}),
        (rgba.convert("CMYK"), "JPEG", {}),
        (palette, "GIF", {"save_all": True, "append_images": [palette.rotate(90)]}),
        (rgba, "WEBP", {"exif": exif.tobytes()}),
        (rgba, "TIFF", {"compression": "tiff_lzw", "exif": exif}),
        (deep, "TIFF", {}),
        (rgba.convert("F"), "TIFF", {}),
        (rgba.convert("RGB"), "BMP", {}),
        (rgba, "ICO", {"sizes": [(12, 9)]}),
        (rgba.convert("RGB"), "PPM", {}),
        (rgba, "TGA", {}),
        (rgba.convert("RGB"), "PCX", {}),
        (rgba.convert("1"), "XBM", {}),
        (rgba, "DDS", {}),
        (rgba.convert("RGB"), "JPEG2000", {}),
        (rgba, "ICNS", {}),
        (rgba.convert("L"), "IM", {}),
    ]
    files = []
    for image, kind, options in versions:
        stream = io.BytesIO()
        try:
            image.save(stream, kind, **options)
        except (OSError, KeyError, ValueError):  # a Pillow without this format
            continue
        files.append(stream.getvalue())
    return files


WORDS = [b"", b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"IDAT", b"tRNS", b"Exif\0\0", b"MM\0*"]


def test_damaged_images(tmp_path: Path) -> None:
    generator = random.Random(1)
    files = image_files()
    assert len(files) > 12
    opened = 0
    for case in range(CASES * 4 // 10):
        content = damaged(generator.choice(files), generator, WORDS)
        path = tmp_path / "image"
        path.write_bytes(content)
        text = base64.b64encode(content).decode()
        picture: Any = generator.choice((content, path, f"data:image/png;base64,{text}"))
        sample = Sample("s", "q", picture)
        opened += checked(lambda sample=sample: content_key(sample), case)  # type: ignore[misc]
    assert 0 < opened < CASES * 4 // 10


def test_damaged_pil_images_and_arrays() -> None:
    import numpy as np

    generator = random.Random(2)
    modes = [
        "1",
        "L",
        "P",
        "RGB",
        "RGBA",
        "CMYK",
        "YCbCr",
        "LAB",
        "HSV",
        "I",
        "F",
        "LA",
        "PA",
        "RGBX",
        "RGBa",
        "La",
        "I;16",
        "I;16L",
        "I;16B",
    ]
    odd: list[Any] = [
        0,
        300,
        -1,
        b"",
        b"\0\xff",
        (1, 2, 3),
        (70000,) * 3,
        "x",
        1.5,
        None,
        (1,),
        ((),),
    ]
    kinds = ["u1", "u2", "i2", "i4", "i8", "f2", "f4", "f8", "?", "c8", "U3", "O", "M8[s]"]
    for case in range(CASES // 20):
        size = (generator.randrange(4), generator.randrange(4))
        image = Image.new(generator.choice(modes), size)
        image.info = {
            name: generator.choice(odd)
            for name in generator.sample(["transparency", "exif", "xmp", "XML:com.adobe.xmp"], 2)
        }
        sample = Sample("s", "q", image)
        checked(lambda sample=sample: open_images(sample), (case, image.mode, image.info))  # type: ignore[misc]
        shape = tuple(generator.randrange(5) for _ in range(generator.randrange(1, 5)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array = np.frombuffer(generator.randbytes(4096), "u1")[: int(np.prod(shape))]
            array = array.reshape(shape).astype(generator.choice(kinds))
        checked(lambda array=array: array_picture(array, "x"), (case, array.dtype, shape))  # type: ignore[misc]


# Tables


FIELDS = ("id", "query", "image", "label", "answer")


def tables() -> Iterator[tuple[str, bytes]]:
    rows: list[dict[str, Any]] = [
        dict(zip(FIELDS, cells, strict=True))
        for cells in (
            ("a", "What is this?", "one.png", "harmful", "red"),
            ("b", 'And, "this"; or\nthat?', "two.png", "Safe", "3"),
            ("c", "Gr\u00fc\u00dfe \u2028 \u4f60", "", "", ""),
        )
    ]
    for suffix, delimiter in (("csv", ","), ("csv", ";"), ("tsv", "\t")):
        lines = [list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
        quoted = [['"' + cell.replace('"', '""') + '"' for cell in line] for line in lines]
        text = "\r\n".join(delimiter.join(line) for line in quoted)
        yield suffix, text.encode()
        yield suffix, text.encode("utf-16")
    nested = [
        {**row, "image": {"path": row["image"], "bytes": None}, "m": {"k": [1]}} for row in rows
    ]
    yield "jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    yield "jsonl", "\n".join(json.dumps(row) for row in nested).encode()
    yield "json", json.dumps(rows).encode()
    yield "json", json.dumps({"data": nested}).encode()
    yield "json", json.dumps({row["id"]: row for row in rows}).encode()
    columns = {name: {str(k): row[name] for k, row in enumerate(rows)} for name in rows[0]}
    yield "json", json.dumps(columns).encode()


TABLE_WORDS = [
    b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"'", b",", b";", b"\t", b"\n", b"\r", b"\r\n",
    b"{", b"}", b"[", b"]", b"[" * 2000, b"null", b"NaN", b"Infinity", b"true", b"1e999",
    b"1" * 5000, b"\\ud800", b"\\u0000", b"\xe2\x80\xa8", b"\xc2\x85", b"\x0c", b"data:",
    b"data:image/png;base64,", b"sep=;\r\n", b"iVBORw0KGgo", b"/9j/", b"http://",
    b"C:\\x\\one.png", b"/etc/hostname", b"..", b'["one.png"]', b"['one.png', 'two.png']",
    b'{"bytes": "x"}', b"x" * 3000, b"query", b"id", b'{"0": "one.png"}', b"/dev/zero",
    b"one.png", b".", b"~",
]  # fmt: skip
MAPS: list[dict[str, str]] = [
    {}, {}, {"image": "image.path"}, {"category": "m.k.0"}, {"query": "answer"}, {"id": "query"},
    {"label": "nothing"}, {"context": "m"},
]  # fmt: skip


ODD: list[Any] = [
    None, "", " ", "q", "nan", float("nan"), float("inf"), 0, -1, 10**40, 1.5, True, b"", b"\xff",
    "one.png", "\ud800", "\0", "[1", "[[]]", "data:", "data:,x", "x" * 9000, "/9j/" + "A" * 60,
    object(), Image.new("L", (2, 2)), Path("one.png"), complex(1, 2), {1, 2}, range(3),
    "http://x", "harmful", "judge", "/x/one.png", "..", "/",
]  # fmt: skip


def odd_cell(generator: random.Random, depth: int = 0) -> Any:
    kind = generator.randrange(8) if depth < 3 else 7
    if kind == 0:
        return [odd_cell(generator, depth + 1) for _ in range(generator.randrange(3))]
    if kind == 1:
        keys = generator.sample(["bytes", "path", "a", "0"], generator.randrange(4))
        return {key: odd_cell(generator, depth + 1) for key in keys}
    return generator.choice(ODD)


def odd_table(generator: random.Random) -> tuple[str, bytes]:
    """(suffix, content) of a table that is written well, with odd cells and rows."""
    names = ["id", "query", "image", "label", "answer", "match", "", " ", "m", "index"]
    header = generator.sample(names, generator.randrange(1, 7))
    rows = [
        [generator.choice(("q", "r", "one.png", odd_cell(generator))) for _ in header]
        + generator.choice(([], [], [], ["", ""], ["more"]))
        for _ in range(generator.randrange(4))
    ]
    suffix = generator.choice(("csv", "tsv", "json", "jsonl"))
    if suffix in {"json", "jsonl"}:
        objects = [dict(zip(header, row, strict=False)) for row in rows]
        lines = [json.dumps(row, default=str) for row in objects]
        return suffix, ("\n".join(lines) if suffix == "jsonl" else f"[{','.join(lines)}]").encode()
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=generator.choice(",;\t"))
    writer.writerow(header)
    writer.writerows(row[: generator.randrange(len(row) + 1)] for row in rows)
    encoding = generator.choice(("utf-8", "utf-8-sig", "utf-16", "latin-1"))
    return suffix, stream.getvalue().encode(encoding, "replace")


def test_damaged_tables(tmp_path: Path) -> None:
    generator = random.Random(3)
    files = list(tables())
    for name in ("one.png", "two.png"):
        Image.new("RGB", (3, 2), "red").save(tmp_path / name)

    def use(path: Path, options: dict[str, Any]) -> None:
        loaded = load_samples(path, **options)
        assert loaded.samples
        first, rest = split_by_content(loaded.samples, 0.5)
        refuse_leaks(first, rest)
        refuse_unratable(loaded)

    loaded = 0
    for case in range(CASES * 4 // 10):
        if generator.random() < 0.5:
            suffix, content = odd_table(generator)
        else:
            suffix, content = generator.choice(files)
            content = damaged(content, generator, TABLE_WORDS)
        path = tmp_path / f"table.{suffix}"
        path.write_bytes(content)
        options = {
            "columns": generator.choice(MAPS),
            "images": generator.choice((None, tmp_path)),
            "label": generator.choice((None, "harmful")),
            "on_error": generator.choice(("stop", "skip")),
            "limit": generator.choice((None, 1, 2)),
        }
        loaded += checked(lambda path=path, options=options: use(path, options), case)  # type: ignore[misc]
    assert 0 < loaded < CASES * 4 // 10


def test_odd_cells(tmp_path: Path) -> None:
    generator = random.Random(4)
    Image.new("RGB", (3, 2), "red").save(tmp_path / "one.png")

    def use(rows: list[dict[str, Any]], columns: dict[str, str], search: bool) -> None:
        samples = rows_to_samples(rows, columns, folder=tmp_path, source="mine", search=search)
        for sample in samples:
            content_key(sample)

    names = ["id", "query", "image", "caption", "category", "label", "answer", "match", "context"]
    used = 0
    for case in range(CASES // 10):
        rows = []
        for _ in range(generator.randrange(1, 3)):
            changed = generator.sample(names, generator.randrange(3))
            odd = {name: odd_cell(generator) for name in changed}
            rows.append({"query": "q", "image": "one.png", **odd})
        columns = generator.choice(({}, {}, {}, {"image": "image.0"}, {"label": "context.a"}))
        search = generator.random() < 0.5
        used += checked(lambda r=rows, c=columns, s=search: use(r, c, s), (case, rows))  # type: ignore[misc]
    assert 0 < used < CASES // 10


def test_odd_rows_of_named_sets(tmp_path: Path) -> None:
    generator = random.Random(6)

    def changed(content: Any) -> Any:
        """JSON content with about one leaf changed."""
        if isinstance(content, dict):
            return {k: changed(v) for k, v in content.items() if generator.random() > 0.02}
        if isinstance(content, list):
            return [changed(inner) for inner in content]
        return odd_cell(generator) if generator.random() < 0.1 else content

    used = 0
    for case in range(CASES // 20):
        (name, variant), layout = generator.choice(list(LAYOUTS.items()))
        folder = tmp_path / str(case)
        for file, content in layout.items():
            text = changed(content)
            if isinstance(content, dict | list):
                text = json.dumps(text, default=str)
            put(folder, {file: None if content is None else str(text).replace("\ud800", "?")})
        used += checked(
            lambda folder=folder, name=name, variant=variant: load_samples(  # type: ignore[misc]
                name, path=folder, variant=variant, partial=True
            ),
            (case, name),
        )
    assert 0 < used < CASES // 20


def test_odd_column_maps() -> None:
    generator = random.Random(5)
    pieces = [
        "query",
        "image",
        "=",
        ",",
        '"',
        "\\",
        "'",
        " ",
        ".",
        "a",
        "\n",
        "\0",
        "#",
        "\ud800",
        "x" * 999,
    ]
    for case in range(CASES // 20):
        text = "".join(generator.choices(pieces, k=generator.randrange(8)))
        checked(lambda text=text: parse_columns(text), (case, text))  # type: ignore[misc]
