"""docs/tune.md: fields, options, defences and figures are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

from typer.main import get_command

from cmrm.cli.main import app
from cmrm.defenses import defense_names, make_defense
from cmrm.defenses.base import Defense
from cmrm.tune import choose, proxy, sets
from cmrm.tune import run as search
from cmrm.tune.proxy import STARTS
from cmrm.tune.schema import TrialRow, Tuned

PAGE = (Path(__file__).parents[2] / "docs" / "tune.md").read_text(encoding="utf-8")


def test_every_field_is_named() -> None:
    for model in (Tuned, TrialRow):
        for name in model.model_fields:
            assert f"`{name.removesuffix('_')}" in PAGE, name


def test_options_are_the_commands() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    parameters = [*commands["tune"].params, *commands["evaluate"].params]
    known = {option for parameter in parameters for option in parameter.opts}
    options = set(re.findall(r"`(--[a-z-]+)`", PAGE))
    assert len(options) > 6
    assert options <= known


def test_defences_with_settings_are_listed() -> None:
    for name in defense_names():
        tuned = type(make_defense(name)).space is not Defense.space
        assert (f"`{name}`" in PAGE) is tuned, name


def test_figures() -> None:
    assert f"({choose.MAX_OVER_REFUSAL_GAIN})" in PAGE
    assert f"({choose.MAX_ACCURACY_LOSS})" in PAGE
    assert f"more than {100 * choose.MARGIN:.0f} points" in PAGE
    assert choose.LEAST_REPLIES == 2
    assert f"up to {search.CANDIDATES} random points, for a tenth" in PAGE
    assert (search.SCREENING, search.KEPT, sets.PARTIAL) == (0.1, 4, 0.25)
    assert f"{sets.DEMO_QUESTIONS} visual questions" in PAGE
    assert f"up to {proxy.SAMPLES}\nsamples" in PAGE
    assert {start.split("'")[0].split()[0] for start in STARTS} == {"I", "Sorry", "Unfortunately"}
