"""The five conditions and the corruptions, bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from cmrm import Sample
from cmrm.errors import InputError
from cmrm.prompts.conditions import (
    CORRUPTED,
    FIVE,
    Condition,
    Request,
    Turn,
    build_request,
    build_requests,
    choose_donors,
)

SAMPLE = Sample("one", "What is this?", Image.new("RGB", (30, 20), "red"), caption="A red wall.")


def random_samples() -> list[Sample]:
    generator = np.random.default_rng(0)

    def image(height: int, width: int) -> Image.Image:
        return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))

    samples = [Sample(f"s{k}", f"query {k}", image(33, 41), caption="c") for k in range(3)]
    return [*samples, Sample("two", "q", (image(9, 5), image(20, 60)), caption="c")]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("original", "89f4db2f56d25c38"), ("blank", "e4bfdf225759a3ef"),
        ("noise", "5ce0a55176dc2c31"), ("caption", "a926e21ada91828d"),
        ("query", "436676545168e1fc"), ("black", "324a3ad96cfc099a"), ("grey", "78854ea64e10f365"),
        ("mean", "27855723f92f4aa2"), ("blur", "38e61bab8d09ee13"), ("shuffle", "1217b3a7b3dfa419"),
        ("other", "a4fe524b5cf7d80c"),
    ],
)  # fmt: skip
def test_texts_and_pixels_of_every_condition_are_pinned(condition: str, expected: str) -> None:
    digest = hashlib.sha256()
    for request in build_requests(random_samples(), condition, seed=3):
        digest.update(request.text.encode())
        for image in request.images:
            digest.update(repr((image.mode, image.size)).encode() + image.tobytes())
    assert digest.hexdigest()[:16] == expected


def test_five_conditions() -> None:
    requests = {condition: build_request(SAMPLE, condition) for condition in FIVE}
    assert [c.value for c in requests] == ["original", "blank", "noise", "caption", "query"]
    assert requests[Condition.CAPTION].text == "A red wall.\nWhat is this?"
    assert {r.text for c, r in requests.items() if c != "caption"} == {"What is this?"}
    assert [c.value for c, r in requests.items() if r.images] == ["original", "blank", "noise"]
    assert all(r.images[0].size == (30, 20) for r in requests.values() if r.images)
    assert requests[Condition.BLANK].images[0].getcolors() == [(600, (255, 255, 255))]


def test_noise_is_seeded_by_seed_and_sample() -> None:
    def pixels(sample: Sample, seed: int) -> np.ndarray:
        return np.asarray(build_request(sample, "noise", seed=seed).images[0])

    other = Sample("two", "q", SAMPLE.image)
    assert (pixels(SAMPLE, 1) == pixels(SAMPLE, 1)).all()
    assert (pixels(SAMPLE, 1) != pixels(SAMPLE, 2)).any()
    assert (pixels(SAMPLE, 1) != pixels(other, 1)).any()
    assert 110 < pixels(SAMPLE, 1).mean() < 145


def test_corruptions_keep_the_size_and_change_the_pixels() -> None:
    samples = random_samples()[:3]
    for condition in CORRUPTED:
        once, again = (list(build_requests(samples, condition, seed=3)) for _ in range(2))
        for sample, request, repeated in zip(samples, once, again, strict=True):
            assert isinstance(sample.image, Image.Image)
            assert request.images[0].size == (41, 33)
            assert request.images[0].tobytes() == repeated.images[0].tobytes()
            assert request.images[0].tobytes() != sample.image.tobytes()


@pytest.mark.parametrize("condition", ["noise", "shuffle"])
def test_another_seed_gives_other_pixels(condition: str) -> None:
    sample = random_samples()[0]
    images = [build_request(sample, condition, seed=seed).images[0] for seed in (3, 4)]
    assert images[0].tobytes() != images[1].tobytes()


def test_corruptions_are_what_they_are_called() -> None:
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:8] = (200, 100, 0)
    sample = Sample("one", "q", Image.fromarray(pixels))
    images = {
        condition: np.asarray(build_request(sample, condition).images[0])
        for condition in CORRUPTED
        if condition is not Condition.OTHER
    }
    assert (images[Condition.BLACK] == 0).all()
    assert (images[Condition.GREY] == 128).all()
    assert (images[Condition.MEAN] == (100, 50, 0)).all()
    assert images[Condition.BLUR].std() < pixels.std()
    shuffled = images[Condition.SHUFFLE].reshape(-1, 3).tolist()
    assert sorted(shuffled) == sorted(pixels.reshape(-1, 3).tolist())


def test_the_image_of_another_sample() -> None:
    samples = [Sample(c, "q", Image.new("RGB", (8, 8), c)) for c in ("red", "green", "blue")]
    donors = choose_donors(samples)
    assert all(donor.id != sample_id for sample_id, donor in donors.items())
    assert len({donor.id for donor in donors.values()}) == 3
    with pytest.raises(InputError, match="at least 2 samples with an image; there are 1"):
        choose_donors(samples[:1])
    with pytest.raises(InputError, match="from another sample"):
        build_request(samples[0], "other")


def test_several_images_are_each_corrupted() -> None:
    sample = Sample("two", "q", (Image.new("RGB", (8, 8), "red"), Image.new("RGB", (6, 4), "blue")))
    assert [image.size for image in build_request(sample, "noise").images] == [(8, 8), (6, 4)]
    assert build_request(sample, "original").images[1].getpixel((0, 0)) == (0, 0, 255)


def test_a_transparent_image_is_asked_on_white() -> None:
    sample = Sample("a", "q", Image.new("RGBA", (4, 4)))
    assert build_request(sample, "original").images[0].getcolors() == [(16, (255, 255, 255))]


def test_what_a_condition_needs() -> None:
    with pytest.raises(InputError, match="sample 's' has no image"):
        build_request(Sample("s", "q"), "original")
    with pytest.raises(InputError, match="sample 's' has no caption"):
        build_request(Sample("s", "q"), "caption")
    with pytest.raises(InputError, match="unknown condition 'sepia'; one of original, blank"):
        build_request(Sample("s", "q"), "sepia")


@pytest.mark.parametrize("condition", list(Condition))
def test_a_request_knows_its_sample(condition: Condition) -> None:
    samples = random_samples()
    requests = build_requests(samples, condition)
    assert [request.id for request in requests] == [sample.id for sample in samples]


@pytest.mark.parametrize(
    "change",
    [Request.without_images, lambda r: r.corrupted(Condition.NOISE, seed=0, key="k")],
    ids=["without images", "corrupted"],
)
def test_a_changed_request_keeps_its_id(change: Callable[[Request], Request]) -> None:
    request = Request("q", (SAMPLE.image,), id="a")  # type: ignore[arg-type]
    assert change(request).id == "a"


def test_the_id_makes_no_other_request() -> None:
    assert Request("q", id="a") == Request("q", id="b") == Request("q")
    assert hash(Request("q", id="a")) == hash(Request("q"))


def test_a_conversation_is_corrupted_turn_by_turn() -> None:
    image = Image.new("RGB", (8, 8), "red")
    request = Request(
        "q", (image,), before=(Turn("user", "p", (image, image)), Turn("assistant", "r"))
    )
    noisy = request.corrupted(Condition.NOISE, seed=0, key="k")
    assert len({i.tobytes() for i in noisy.all_images}) == 3
    assert (
        noisy.before[0].images[0].tobytes()
        == build_request(Sample("k", "q", image), "noise").images[0].tobytes()
    ), "the first image of the conversation is drawn for the key itself"
    bare = noisy.without_images()
    assert not bare.all_images
    assert [turn.text for turn in bare.before] == ["p", "r"]
