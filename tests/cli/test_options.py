"""Shared options: layers, lists, tables, sparklines, missing libraries."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmrm.cli.options import (
    changed,
    need_extra,
    parse_layers,
    parse_names,
)
from cmrm.cli.screen import print_rows, sparkline
from cmrm.errors import InputError, MissingExtraError
from cmrm.steering.setting import Steering


def test_layers() -> None:
    assert parse_layers("3,0-1") == (0, 1, 3)
    assert parse_layers(" 2 , 4 - 5 ") == (2, 4, 5)
    assert parse_layers(None) is None


@pytest.mark.parametrize(
    "text", ["2-1", "", "a", "1-", "-1", "1-2-3", "²", "1,,2", "0-99999999999"]
)
def test_wrong_layers(text: str) -> None:
    with pytest.raises(InputError, match="neither a layer nor a range"):
        parse_layers(text)


@given(st.text(alphabet="0123456789-, x", max_size=12))
def test_layers_are_numbers_or_an_input_error(text: str) -> None:
    try:
        layers = parse_layers(text)
    except InputError:
        return
    assert layers == tuple(sorted(set(layers or ())))


def test_names() -> None:
    assert parse_names("a, b,a,", "--x") == ["a", "b"]
    with pytest.raises(InputError, match="--x names nothing"):
        parse_names(" , ", "--x")


def test_sparkline() -> None:
    assert sparkline([0.0, 1.0, 8.0]) == "▁▂█"
    assert sparkline([]) == ""
    assert sparkline([0.4, 0.5, 0.75, 1.0], 0.5, 1.0) == "▁▁▅█"


def test_changed_options_of_another_kind_leave_the_rest_at_its_defaults() -> None:
    base = Steering(alpha=0.4, positions="all", layers=(0, 1))
    assert changed(base, alpha=0.2) == replace(base, alpha=0.2)
    assert changed(base, schedule="per_layer") == replace(base, schedule="per_layer")
    assert changed(base, operator="fill") == Steering(operator="fill")
    fill = Steering(operator="fill", layers=(2, 3))
    assert changed(fill, schedule="sequential", alpha=0.5) == Steering(0.5, "sequential")
    assert changed(fill, gate=True) == Steering(operator="fill", gate=True)
    assert changed(fill, gate=True, layers="3") == Steering(operator="fill", gate=True, layers=(3,))
    with pytest.raises(InputError, match="leave one of the two out"):
        changed(fill, operator="fill", schedule="telescoped")


def test_brackets_in_a_cell_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows("[bold]title", ["[red]column"], [["12.5 % [low, high]"]])
    shown = capsys.readouterr().out
    assert "[bold]title" in shown
    assert "[red]column" in shown
    assert "12.5 % [low, high]" in shown


def test_a_missing_library_names_the_extra() -> None:
    need_extra("a test", "dev", ("pytest",))
    with pytest.raises(MissingExtraError, match=r"a test needs no_such_library; .*'cmrm\[dev\]'"):
        need_extra("a test", "dev", ("pytest", "no_such_library"))
