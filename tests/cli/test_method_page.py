"""docs/method.md: its Python runs, its commands have the options that they name, its figures are
those of the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cli.commands import run
from cmrm import Sample
from cmrm.model.vlm import VLM
from cmrm.shift import gap, harm_gate, summary
from cmrm.steering.setting import Steering

PAGE = (Path(__file__).parents[2] / "docs" / "method.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    return str(found)


def test_the_python_of_the_page_runs(
    vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cmrm.load_vlm", lambda *names, **options: vlm, raising=False)
    pictures = [Image.new("RGB", (16 + k, 16), (20 * k, 90, 10)) for k in range(10)]
    names: dict[str, Any] = {
        "harmful_requests": [(f"A harmful matter {k}?", pictures[k]) for k in range(10)],
        "benign_requests": [(f"A benign matter {k}?", pictures[k]) for k in range(10)],
        "samples": [Sample("s", "What is it?", pictures[0])],
    }
    exec(block("python"), names)
    assert (tmp_path / "shift.safetensors").exists()
    assert len(names["replies"]) == 1
    assert names["shift"].records["gap"]["reason"] in capsys.readouterr().out


def test_the_commands_of_the_page_know_their_options() -> None:
    lines = [line.partition("  #")[0].split() for line in block("console").splitlines()]
    assert {words[1] for words in lines} == {"extract", "inspect", "generate", "evaluate"}
    for words in lines:
        shown = run(words[1], "--help").output
        assert all(word in shown for word in words if word.startswith("--"))


def test_the_settings_of_the_page_are_settings() -> None:
    settings = re.findall(r"`(Steering\([^`]*\))`", PAGE)
    assert len(settings) == 4
    assert all(isinstance(eval(text, {"Steering": Steering}), Steering) for text in settings)


def test_the_figures_of_the_page_are_those_of_the_code() -> None:
    page = " ".join(PAGE.split())
    assert f"at least {gap.LEAST_AUC:g}, and the lower end" in page
    assert f"of `lost` is above {gap.LEAST_LOSS:g}" in page
    assert f"telescoped at alpha {gap.CAUTIOUS_ALPHA:g} in the upper half" in page
    assert f"within {harm_gate.CLOSE:g} of the best" in page
    assert f"(`--false-alarms`, {harm_gate.FALSE_ALARMS:g})" in page
    assert f"Up to {summary.KEPT} anchors of each kind" in page
    assert harm_gate.LEAST == 10
    assert "At least ten anchors of each kind" in page
