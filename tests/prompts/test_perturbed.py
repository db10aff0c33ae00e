"""Perturbed images: what each kind does, seeds, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cmrm import Sample
from cmrm.errors import InputError
from cmrm.prompts.perturbed import (
    PERTURBATIONS,
    Perturbation,
    all_perturbations,
    parsed_perturbations,
)
from cmrm.prompts.sample import open_images


def picture(width: int = 60, height: int = 40) -> Image.Image:
    rng = np.random.default_rng(0)
    smooth = rng.integers(40, 215, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC)


def detailed(width: int = 60, height: int = 40) -> Image.Image:
    rng = np.random.default_rng(1)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def distance(one: Image.Image, other: Image.Image) -> float:
    pair = [np.asarray(image, dtype=float) for image in (one, other)]
    return float(np.abs(pair[0] - pair[1]).mean())


@pytest.mark.parametrize("name", sorted(set(PERTURBATIONS) - {"crop", "contrast"}))
def test_each_level_changes_more_than_the_one_before(name: str) -> None:
    image = detailed(400, 300)
    moved = [
        distance(Perturbation(name, level).of(image, seed=0, key="a"), image)
        for level in PERTURBATIONS[name].levels
    ]
    assert 0 < moved[0] < moved[1] < moved[2]


def test_what_each_kind_does() -> None:
    image = picture()
    pixels = np.asarray(image, dtype=float)
    noisy = np.asarray(Perturbation("gaussian", 0.1).of(image, seed=0, key="a"), dtype=float)
    assert 22 < (noisy - pixels).std() < 27
    salted = np.asarray(Perturbation("salt", 0.1).of(image, seed=0, key="a"))
    black, white = ((salted == value).all(-1).mean() for value in (0, 255))
    assert 0.03 < black < 0.07
    assert 0.03 < white < 0.07
    kept = (salted == np.asarray(image)).all(-1).mean()
    assert 0.87 < kept < 0.93
    assert Perturbation("crop", 0.5).of(image, seed=0, key="a").size == (30, 20)
    middle = np.asarray(Perturbation("crop", 0.5).of(image, seed=0, key="a"))
    assert (middle == np.asarray(image)[10:30, 15:45]).all()
    assert Perturbation("resize", 0.25).of(image, seed=0, key="a").size == image.size
    flat = np.asarray(Perturbation("contrast", 0.5).of(image, seed=0, key="a"), dtype=float)
    assert flat.std() == pytest.approx(pixels.std() / 2, rel=0.1)
    assert np.asarray(Perturbation("contrast", 0.0).of(image, seed=0, key="a")).std() == 0
    tiny = Image.new("RGB", (1, 1), "red")
    for perturbation in all_perturbations():
        assert perturbation.of(tiny, seed=0, key="a").mode == "RGB"


@given(kind=st.sampled_from(["gaussian", "salt"]), seed=st.integers(0, 3), key=st.text(max_size=3))
def test_noise_follows_seed_and_key_alone(kind: str, seed: int, key: str) -> None:
    image, perturbation = picture(12, 9), Perturbation(kind, 0.2)
    first = perturbation.of(image, seed=seed, key=key)
    assert distance(first, perturbation.of(image, seed=seed, key=key)) == 0
    assert distance(first, perturbation.of(image, seed=seed + 1, key=key)) > 0
    assert distance(first, perturbation.of(image, seed=seed, key=key + "x")) > 0


def test_samples_keep_everything_but_their_images() -> None:
    one = Sample("a", "What is it?", picture(), label="benign", answer="red")
    two = Sample("b", "Which?", (picture(), picture(20, 20)), label="harmful")
    perturbation = Perturbation("gaussian", 0.1)
    changed = perturbation.sample(one, seed=0)
    assert (changed.id, changed.query, changed.label, changed.answer) == (
        "a", "What is it?", "benign", "red",
    )  # fmt: skip
    assert distance(open_images(changed)[0], picture()) > 5
    pair = open_images(perturbation.sample(two, seed=0))
    assert [image.size for image in pair] == [(60, 40), (20, 20)]
    assert distance(pair[0], open_images(changed)[0]) > 0, "each image is drawn for itself"


def test_names_and_levels() -> None:
    assert len(all_perturbations()) == sum(len(kind.levels) for kind in PERTURBATIONS.values())
    assert list(map(str, parsed_perturbations(["jpeg:20", "crop"]))) == [
        "jpeg 20", "crop 0.9", "crop 0.75", "crop 0.5",
    ]  # fmt: skip
    for text, message in (
        ("fog", "NAME:LEVEL"), ("fog:1", "unknown perturbation 'fog'"), ("jpeg:", "NAME:LEVEL"),
        ("jpeg:0", r"within 1\.\.95"), ("jpeg:nan", "NAME:LEVEL"), ("crop:0", "within"),
        ("gaussian:-1", "within"), ("blur:inf", "within"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            parsed_perturbations([text])
    with pytest.raises(InputError, match="named twice"):
        parsed_perturbations(["jpeg:20", "jpeg"])
