"""Training data: apart from anchors and test, and emoji out of their archive."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from cmrm.demo.train.corpus import generic_instructions, load_emoji, load_vqa_images
from cmrm.errors import InputError
from cmrm.prompts.easy_vqa import vqa_captions
from cmrm.prompts.ours import FORMS, load_prompts, train_texts


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def emoji_archive(path: Path, entries: list[dict[str, str | None]], pixel: tuple[int, ...]) -> Path:
    image = io.BytesIO()
    Image.new("RGBA", (64, 64), pixel).save(image, "PNG")
    with tarfile.open(path, "w:gz") as tar:
        for entry in entries:
            add(tar, f"package/img/twitter/64/{entry['image']}", image.getvalue())
        add(tar, "package/emoji.json", json.dumps(entries).encode())
    return path


def test_training_requests_are_apart_from_anchor_and_test() -> None:
    others = [prompt for prompt in load_prompts() if prompt.split != "train"]
    unseen = {prompt.text for prompt in others} | {prompt.act for prompt in others}
    for label in ("harmful", "benign"):
        texts = [text for part in (1, 2, 3, 4, 5, 6) for text in train_texts(label, part)]
        assert not unseen & set(texts)


def test_everyday_instructions_are_none_of_the_prompts() -> None:
    assert not {prompt.text for prompt in load_prompts()} & set(generic_instructions())
    assert len(set(generic_instructions())) == len(generic_instructions())


def test_discussions_name_the_act_and_never_ask_for_it() -> None:
    harmful = {p.act for p in load_prompts() if p.label == "harmful" and p.split == "train"}
    discussions = train_texts("benign", 6)
    assert len(discussions) == 6 * len(harmful)
    assert all(any(act in text for act in harmful) for text in discussions)
    assert not train_texts("harmful", 6)
    assert not set(discussions) & {form.format(act) for act in harmful for form in FORMS}


def test_easy_vqa_images_carry_their_captions() -> None:
    images = load_vqa_images("test")
    assert {image.image_id: image.caption for image in images} == vqa_captions("test")
    assert {image.image.mode for image in images} == {"RGB"}


def test_emoji_are_captioned_with_an_article(tmp_path: Path) -> None:
    entries: list[dict[str, str | None]] = [
        {"category": "Animals", "image": "1.png", "name": "OWL", "short_name": "owl"},
        {"category": "Smileys", "image": "2.png", "name": None, "short_name": "big-grin"},
        {"category": "Flags", "image": "3.png", "name": "FLAG", "short_name": "flag"},
    ]
    emoji = load_emoji(emoji_archive(tmp_path / "emoji.tgz", entries, (255, 0, 0, 255)))
    assert [image.caption for image in emoji] == ["an owl", "a big grin"]
    assert [image.image_id for image in emoji] == [None, None]


def test_transparent_pixels_of_emoji_are_white(tmp_path: Path) -> None:
    entries: list[dict[str, str | None]] = [
        {"category": "Animals", "image": "1.png", "name": "OWL", "short_name": "owl"}
    ]
    (emoji,) = load_emoji(emoji_archive(tmp_path / "emoji.tgz", entries, (0, 0, 0, 0)))
    assert emoji.image.getcolors() == [(64 * 64, (255, 255, 255))]


def test_a_missing_emoji_archive_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.tgz does not exist; .*npm pack"):
        load_emoji(tmp_path / "none.tgz")


@pytest.mark.parametrize("content", [b"", b"no archive", b"\x1f\x8b\x08\x00 damaged"])
def test_a_damaged_emoji_archive_is_named(tmp_path: Path, content: bytes) -> None:
    archive = tmp_path / "emoji.tgz"
    archive.write_bytes(content)
    with pytest.raises(InputError, match="npm pack"):
        load_emoji(archive)


def test_a_cut_off_emoji_archive_is_named(tmp_path: Path) -> None:
    entries: list[dict[str, str | None]] = [
        {"category": "Animals", "image": "1.png", "name": "OWL", "short_name": "owl"}
    ]
    archive = emoji_archive(tmp_path / "emoji.tgz", entries, (0, 0, 0, 0))
    archive.write_bytes(archive.read_bytes()[:-40])
    with pytest.raises(InputError, match="npm pack"):
        load_emoji(archive)


def test_an_archive_of_something_else_is_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "other.tgz", "w:gz") as tar:
        add(tar, "package/readme.md", b"other")
    with pytest.raises(InputError, match="holds no emoji"):
        load_emoji(tmp_path / "other.tgz")
