"""Splits by content identity, set hashes, draws, and the leakage guard."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cmrm import Sample
from cmrm.errors import InputError
from cmrm.prompts.sample import content_key
from cmrm.prompts.splits import (
    SetHash,
    check_unique,
    drawn_by_hash,
    refuse_leaks,
    set_hash,
    split_by_content,
    templates,
)
from cmrm.prompts.text import normalised

FIXED = "The image shows a list numbered 1, 2, and 3."


def plain(shade: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (shade, 0, 0))


def texts(n: int) -> list[Sample]:
    return [Sample(f"s{k}", f"question {k}", plain(0)) for k in range(n)]


def typographic(n: int) -> list[Sample]:
    """A set as FigStep: one text, the request in the image."""
    return [Sample(f"f{k}", FIXED, plain(k)) for k in range(n)]


# Ids and hashes


def test_repeated_ids_are_refused() -> None:
    with pytest.raises(InputError, match="two samples have the id 'a'; ids must be unique"):
        check_unique([Sample("a", "q"), Sample("b", "q"), Sample("a", "r")])
    members = SetHash()
    members.add(Sample("a", "q"))
    with pytest.raises(InputError, match="two samples have the id 'a'"):
        members.add(Sample("a", "r"))


def test_unique_ids_are_checked_without_opening_images(tmp_path: Path) -> None:
    check_unique([Sample("a", "q", tmp_path / "none.png")])


def test_the_set_hash_does_not_depend_on_the_order() -> None:
    samples = texts(5)
    assert set_hash(samples) == set_hash(samples[::-1])


@pytest.mark.parametrize(
    "other", [Sample("b", "q", plain(1)), Sample("a", "r", plain(1)), Sample("a", "q", plain(2)),
              Sample("a", "q")]
)  # fmt: skip
def test_the_set_hash_covers_id_query_and_image(other: Sample) -> None:
    assert set_hash([Sample("a", "q", plain(1))]) != set_hash([other])


def test_ids_with_half_a_surrogate_pair_have_a_hash() -> None:
    assert len(set_hash([Sample("\ud800", "q \udfff")])) == 64


# Templates and splits


def test_a_template_is_common_and_has_several_images() -> None:
    assert templates(typographic(4)) == {normalised(FIXED)}
    assert templates([*typographic(4), *texts(4)]) == {normalised(FIXED)}
    assert not templates([*typographic(4), *texts(5)]), "less than half of the set"
    assert not templates([Sample(str(k), FIXED, plain(1)) for k in range(4)]), "one image"
    assert not templates([Sample(str(k), FIXED) for k in range(4)]), "no image"
    assert not templates(typographic(1))
    assert not templates([])


def test_a_split_does_not_depend_on_order_or_size() -> None:
    samples = texts(500)
    first, rest = split_by_content(samples, 0.2)
    assert len(first) + len(rest) == 500
    assert 60 < len(first) < 140
    again, _ = split_by_content(samples[:250][::-1], 0.2)
    assert {s.id for s in again} == {s.id for s in first if int(s.id[1:]) < 250}


def test_the_salt_decides_the_split() -> None:
    sides = {tuple(s.id for s in split_by_content(texts(40), 0.5, salt=x)[0]) for x in "abc"}
    assert len(sides) == 3


def test_what_asks_the_same_stands_on_one_side() -> None:
    samples = [
        Sample(f"{k}{way}", query, plain(k))
        for k in range(50)
        for way, query in enumerate((f"Question {k}?", f"  question  {k}?", f"QUESTION {k}?"))
    ]
    first, rest = split_by_content(samples, 0.5)
    assert first
    assert rest
    assert not {normalised(s.query) for s in first} & {normalised(s.query) for s in rest}


def test_a_set_with_one_text_is_split_by_its_images() -> None:
    samples = typographic(100)
    copies = [Sample(f"copy {s.id}", s.query, s.image) for s in samples]
    first, rest = split_by_content([*samples, *copies], 0.3)
    assert 20 < len(first) < 100, "not all or nothing"
    assert not {content_key(s) for s in first} & {content_key(s) for s in rest}


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none(share: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        split_by_content(texts(3), share)


def test_shares_of_nothing_and_of_all() -> None:
    assert [len(side) for side in split_by_content(texts(9), 0.0)] == [0, 9]
    assert [len(side) for side in split_by_content(texts(9), 1.0)] == [9, 0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcA "), st.sampled_from([None, 1, 2, 3]))), st.floats(0, 1)
)
def test_a_split_never_leaks(kinds: list[tuple[str, int | None]], share: float) -> None:
    samples = [
        Sample(str(k), f"q{query}", None if shade is None else plain(shade))
        for k, (query, shade) in enumerate(kinds)
    ]
    first, rest = split_by_content(samples, share)
    assert sorted(s.id for s in (*first, *rest)) == sorted(s.id for s in samples)
    assert not {content_key(s) for s in first} & {content_key(s) for s in rest}
    fixed = templates(samples)
    shared = {normalised(s.query) for s in first} & {normalised(s.query) for s in rest}
    assert shared <= fixed


# The leakage guard


@pytest.mark.parametrize(
    "anchor",
    [Sample("x", "question 1", plain(0)), Sample("x", "  QUESTION 1 ", plain(0)),
     Sample("x", "question 1", plain(9)), Sample("x", "question 1")],
    ids=["the same", "spelled otherwise", "with another image", "without image"],
)  # fmt: skip
def test_an_anchor_that_is_tested_leaks(anchor: Sample) -> None:
    message = r"^1 anchors are asked in the test sets too \(the first: 'x'\); fit on other samples"
    with pytest.raises(InputError, match=message):
        refuse_leaks([Sample("ok", "something else", plain(0)), anchor], texts(3))


def test_all_leaks_are_counted() -> None:
    with pytest.raises(InputError, match=r"^3 anchors .*the first: 's0'"):
        refuse_leaks(texts(3), texts(5))


def test_other_questions_with_the_same_image_do_not_leak() -> None:
    refuse_leaks([Sample("x", "question 7", plain(0))], texts(3))
    refuse_leaks([], texts(3))
    refuse_leaks(texts(3), [])


def test_the_text_of_a_template_is_no_leak_but_its_image_is() -> None:
    samples = typographic(10)
    refuse_leaks(samples[:4], samples[4:])
    refuse_leaks(samples[:1], samples[4:])
    with pytest.raises(InputError, match=r"^1 anchors .*'f4'"):
        refuse_leaks(samples[:5], samples[4:])


def test_a_template_among_other_anchors_is_one_in_the_tested_set() -> None:
    refuse_leaks([*texts(20), *typographic(3)], typographic(10)[3:])


def test_images_are_opened_only_where_queries_are_shared(tmp_path: Path) -> None:
    refuse_leaks([Sample("x", "other", tmp_path / "none.png")], texts(3))


def test_the_two_sides_of_a_split_never_leak() -> None:
    for samples in (texts(60), typographic(60), [*texts(30), *typographic(30)]):
        first, rest = split_by_content(samples, 0.3)
        assert first
        refuse_leaks(first, rest)


# Draws


def test_a_draw_does_not_depend_on_the_order() -> None:
    samples = texts(30)
    shuffled = random.Random(0).sample(samples, len(samples))
    drawn = drawn_by_hash(samples, 7)
    assert len(drawn) == 7
    assert {s.id for s in drawn} == {s.id for s in drawn_by_hash(shuffled, 7)}
    assert drawn == [s for s in samples if s in drawn], "the order of the set stays"
    assert drawn_by_hash(samples, None) == samples == drawn_by_hash(samples, 99)
