"""The dev set: what it must hold, its quarter, and the leakage guard."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cmrm import Sample
from cmrm.errors import InputError
from cmrm.prompts.splits import set_hash
from cmrm.tune.sets import Dev, Sets, demo_sets
from tune.sources import samples, small_sets


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        (("harmful", "question"), "no benign samples, on which over-refusal"),
        (("benign",), "no harmful samples, on which the unsafe rate"),
    ],
)
def test_both_kinds_are_needed(kinds: tuple[str, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Dev.of([sample for kind in kinds for sample in samples("dev", kind, 3)])


def test_dev_samples_have_images_and_ids_of_their_own() -> None:
    every = [*samples("dev", "harmful", 3), *samples("dev", "benign", 3)]
    with pytest.raises(InputError, match="1 of 6 dev samples have no image"):
        Dev.of([replace(every[0], image=None), *every[1:]])
    with pytest.raises(InputError, match="two samples have the id"):
        Dev.of([*every, every[0]])


def test_a_quarter_of_each_kind_and_the_rest() -> None:
    dev = small_sets(dev=8, questions=5).dev
    first, rest = dev.divided()
    assert [len(part) for part in first.parts] == [2, 2, 2]
    assert [len(part) for part in rest.parts] == [6, 6, 3]
    assert {s.id for s in (*first.samples, *rest.samples)} == {s.id for s in dev.samples}
    reordered = Dev(dev.harmful[::-1], dev.benign, dev.questions)
    assert set_hash(reordered.divided()[0].samples) == set_hash(first.samples)
    tiny = small_sets(dev=1, questions=0).dev
    assert [len(part) for part in tiny.divided()[0].parts] == [1, 1]
    assert not tiny.divided()[1].samples


def test_a_dev_set_may_not_ask_what_anchors_ask() -> None:
    sets = small_sets()
    sets.check()
    leaking = replace(sets.anchors.harmful[3], id="another name")
    with pytest.raises(InputError, match="1 anchors are asked in the dev set too"):
        Sets(sets.anchors, replace(sets.dev, harmful=(*sets.dev.harmful, leaking))).check()
    with pytest.raises(InputError, match="among the harmful and among the benign"):
        Sets(replace(sets.anchors, benign=sets.anchors.harmful), sets.dev).check()


def test_neither_may_ask_what_a_test_set_asks() -> None:
    sets = small_sets()
    for part, words in (
        (sets.anchors.benign, "12 anchors are asked in a test set"),
        (sets.dev.benign, "8 dev samples are asked in a test set"),
        (sets.dev.questions[:1], "1 dev samples are asked in a test set"),
    ):
        with pytest.raises(InputError, match=words):
            sets.check([samples("dev", "question", 0), list(part)])


def test_the_same_question_about_another_image_is_another_question() -> None:
    sets = small_sets()
    other = [
        replace(question, id=f"t{k}", image=sets.anchors.harmful[k].image)
        for k, question in enumerate(sets.dev.questions)
    ]
    moved: list[Sample] = [
        replace(s, image=o.image) for s, o in zip(other, other[::-1], strict=True)
    ]
    sets.check([moved])


def test_the_demos_own_sets() -> None:
    sets = demo_sets(8)
    assert len(sets.anchors.harmful) + len(sets.dev.harmful) == 96
    assert len(sets.anchors.benign) + len(sets.dev.benign) == 96
    assert min(len(sets.anchors.harmful), len(sets.anchors.benign)) >= 32
    assert min(len(sets.dev.harmful), len(sets.dev.benign)) >= 32
    assert all(sample.answer for sample in sets.dev.questions)
    assert sets.dev.hashes() == demo_sets(8).dev.hashes()
