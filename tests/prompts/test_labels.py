"""The label vocabulary, a constant label, and sets from which no rate can come."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmrm import Sample
from cmrm.errors import InputError
from cmrm.prompts import Loaded, load_samples, refuse_unratable
from cmrm.prompts.labels import folded_label, with_label


@pytest.mark.parametrize(
    ("word", "label"),
    [
        ("harmful", "harmful"), ("Harmful", "harmful"), (" HARMFUL ", "harmful"),
        ("unsafe", "harmful"), ("Unsafe\t", "harmful"), ("benign", "benign"), ("Safe", "benign"),
        ("harmless", "benign"), ("\u00a0Benign", "benign"), ("toxic", "toxic"),
        (" Toxic ", " Toxic "), ("not harmful", "not harmful"), ("safe-ish", "safe-ish"),
        ("1", "1"),
    ],
)  # fmt: skip
def test_words_for_the_two_labels(word: str, label: str) -> None:
    assert folded_label(word) == label


def test_a_constant_label_goes_to_samples_without_a_usable_one() -> None:
    samples = [
        Sample(str(k), "q", label=x) for k, x in enumerate((None, "toxic", "benign", "harmful"))
    ]
    labelled = with_label(samples, " Unsafe ")
    assert [s.label for s in labelled] == ["harmful", "harmful", "benign", "harmful"]
    assert with_label(samples, None) == samples


@pytest.mark.parametrize("label", ["bad", "", "x" * 1000])
def test_a_constant_label_is_harmful_or_benign(tmp_path: Path, label: str) -> None:
    (tmp_path / "a.csv").write_text("query\nq\n")
    with pytest.raises(InputError, match=r"^label is '.*'; one of harmful, benign"):
        load_samples(tmp_path / "a.csv", label=label)


def test_labels_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("query,label\nq,Harmful\nr,safe\ns,other\nt,\n")
    assert [s.label for s in load_samples(tmp_path / "a.csv").samples] == [
        "harmful",
        "benign",
        "other",
        None,
    ]
    whole = load_samples(tmp_path / "a.csv", label="benign")
    assert [s.label for s in whole.samples] == ["harmful", "benign", "benign", "benign"]


def loaded(*samples: Sample) -> Loaded:
    return Loaded("mine.csv", samples)


def test_a_set_with_one_rate_can_be_rated() -> None:
    refuse_unratable(loaded(Sample("a", "q"), Sample("b", "q", label="harmful")))
    refuse_unratable(loaded(Sample("a", "q"), Sample("b", "q", label="benign")))
    refuse_unratable(loaded(Sample("a", "q"), Sample("b", "q", answer="red")))


def test_a_set_without_any_rate_is_refused_with_the_remedy() -> None:
    with pytest.raises(InputError) as caught:
        refuse_unratable(loaded(Sample("a", "q", label="toxic"), Sample("b", "q", label="fine")))
    message = str(caught.value)
    assert message.startswith("mine.csv: no sample is labelled harmful or benign")
    assert "the labels are toxic, fine" in message
    assert "--label" in message
    assert "--map label=COLUMN" in message
    assert len(message) < 400
    with pytest.raises(InputError, match="there are no labels"):
        refuse_unratable(loaded(Sample("a", "q")))
    with pytest.raises(InputError, match="there are no labels"):
        refuse_unratable(loaded())


def test_many_long_labels_are_cut() -> None:
    samples = [Sample(str(k), "q", label=f"{k} " + "x" * 500) for k in range(99)]
    with pytest.raises(InputError, match="and 91 more") as caught:
        refuse_unratable(loaded(*samples))
    assert len(str(caught.value)) < 600
