"""Judge cards: measured agreements, read and written."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from cmrm.errors import InputError
from cmrm.judges.cards import MeasuredAgreement, card_of, cards_from, write_cards

ROW = MeasuredAgreement(
    "refusal", "msts", None, None, n=100, unscored=3, kappa=0.8, tp=40, fn=5, tn=50, fp=5,
    command="cmrm judges agree x.csv",
)  # fmt: skip


def test_an_unknown_judge_has_no_card() -> None:
    assert card_of("chat:nobody/none") == ()


def test_the_shipped_cards_are_readable() -> None:
    document = json.loads(files("cmrm.judges").joinpath("cards.json").read_text())
    for judge, rows in document.items():
        assert len(card_of(judge)) == len(rows) > 0
        assert all(row.command for row in card_of(judge))


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    chinese = replace(ROW, language="zh", kappa=None)
    write_cards(tmp_path / "cards.json", [("small", ROW), ("small", chinese), ("keyword", ROW)])
    cards = cards_from((tmp_path / "cards.json").read_text(), "cards.json")
    assert cards == {"small": (ROW, chinese), "keyword": (ROW,)}


def test_a_figure_is_measured_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two figures for refusal on msts, all models"):
        write_cards(tmp_path / "cards.json", [("small", ROW), ("small", replace(ROW, kappa=0.1))])
    assert not (tmp_path / "cards.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": "kindness"}, "unknown question 'kindness'; one of refusal, unsafe"),
        ({"n": 99}, "their sum has to be n, 99"),
        ({"unscored": -1}, "their sum has to be n"),
        ({"kappa": 1.5}, r"kappa 1\.5 is not within"),
    ],
)
def test_figures_that_contradict_each_other(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(ROW, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "holds no judge cards"),
        ("[]", "holds no judge cards"),
        ('{"small": [{"question": "refusal"}]}', "the fields of small are not those of a card"),
        ('{"small": [1]}', "holds no judge cards"),
    ],
)
def test_broken_cards_are_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        cards_from(text, "cards.json")
    assert "\n" not in str(error.value)
