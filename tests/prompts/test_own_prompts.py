"""Our prompt set: its splits, its training texts, and draws that published figures depend on."""

from __future__ import annotations

from collections import Counter

import pytest

from cmrm.prompts import load_named, load_samples
from cmrm.prompts.ours import Label, Part, Split, load_prompts, prompt_samples, train_texts
from cmrm.prompts.splits import refuse_leaks
from pins import pin, shown


def test_counts_of_categories_and_splits() -> None:
    prompts = load_prompts()
    counts = Counter((p.category, p.label, p.split) for p in prompts)
    categories = {p.category for p in prompts}
    assert len(categories) >= 12
    for category in categories:
        for label in ("harmful", "benign"):
            splits = [counts[category, label, split] for split in ("train", "anchor", "test")]
            assert splits == [12, 8, 20]
    assert len({p.text.lower() for p in prompts}) == len(prompts) == len({p.id for p in prompts})


def test_look_alikes_share_words_with_harmful_requests() -> None:
    prompts = load_prompts()
    harmful = {w for p in prompts if p.label == "harmful" for w in p.act.split() if len(w) > 3}
    benign = [p for p in prompts if p.label == "benign"]
    assert sum(bool(harmful & set(p.act.split())) for p in benign) > 0.5 * len(benign)


@pytest.mark.parametrize(
    ("part", "harmful", "benign"),
    [
        (1, "35a8d1eebd4b9594", "e5cc3a4258ba6f7d"), (2, "e3b0c44298fc1c14", "58122f1087074462"),
        (3, "e3b0c44298fc1c14", "e9c34194509d5f31"), (4, "f07c432cf8f5d9ce", "5a594a6d913f7dc2"),
        (5, "e3b0c44298fc1c14", "4c9ceefbdc70cc8d"), (6, "e3b0c44298fc1c14", "d3b5e41940473149"),
    ],
)  # fmt: skip
def test_training_texts_are_those_of_the_demo_weights(
    part: Part, harmful: str, benign: str
) -> None:
    assert (pin(train_texts("harmful", part)), pin(train_texts("benign", part))) == (
        harmful,
        benign,
    )


@pytest.mark.parametrize(
    ("split", "label", "per_category", "expected"),
    [
        ("anchor", "harmful", None, "9e3b139487eb09f0"),
        ("anchor", "benign", None, "2da755f07fdfdc1c"),
        ("test", "harmful", None, "18497cd7bdd07b7d"),
        ("test", "benign", None, "2df141a5396f98ad"),
        ("test", "harmful", 6, "c702062d8587c080"),
        ("train", "benign", 2, "90439164e27216d6"),
    ],
)
def test_samples_are_those_of_the_published_figures(
    split: Split, label: Label, per_category: int | None, expected: str
) -> None:
    pytest.importorskip("easy_vqa")
    samples = prompt_samples(split, label, per_category=per_category)
    assert pin(shown(sample) for sample in samples) == expected


def test_anchors_and_tests_are_apart() -> None:
    pytest.importorskip("easy_vqa")
    anchors, tests = prompt_samples("anchor", "harmful"), prompt_samples("test", "harmful")
    assert (len(anchors), len(tests)) == (96, 240)
    assert all("/train/" in str(s.image) for s in anchors)
    assert all("/test/" in str(s.image) for s in tests)
    refuse_leaks(anchors, tests)
    few = prompt_samples("test", "harmful", per_category=3)
    assert set(Counter(s.category for s in few).values()) == {3}


@pytest.mark.parametrize(
    ("limit", "n", "expected"),
    [(None, 384, "2b71998ae15e0fba"), (5, 15, "cb042ff9ed614d5f"), (30, 78, "28097c6be7e0a7a2"),
     (300, 780, "274bef50f1781de9")],
)  # fmt: skip
def test_the_demo_set_is_the_one_that_was_measured(
    limit: int | None, n: int, expected: str
) -> None:
    pytest.importorskip("easy_vqa")
    loaded = load_named("demo", {}, limit=limit)
    assert (loaded.name, loaded.harm, len(loaded.samples)) == ("demo", "text", n)
    assert pin((shown(s), s.answer) for s in loaded.samples) == expected
    assert loaded.notes == (() if limit is None else (f"at most {limit} of each kind",))
    assert load_samples("demo", limit=limit) == loaded
