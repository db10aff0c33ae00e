"""`cmrm tune`: JSON, table, what it refuses, and how it ends and goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cmrm.tune.run as run_module
from cli.commands import json_of, output, refused, run
from cmrm.cli import tune as command_module
from cmrm.cli.tune import parsed_budget, setting_text
from cmrm.engines.transformers import TransformersEngine
from cmrm.errors import CmrmError, InputError
from cmrm.shift.artifact import ShiftVectors
from cmrm.tune.schema import read_tuned
from tune.conftest import Files
from tune.scripted import answer
from tune.sources import rows, small_sets, write_set

Command = tuple[Any, ...]


@pytest.fixture(autouse=True)
def replies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TransformersEngine, "answer", answer)
    monkeypatch.setattr(run_module, "CANDIDATES", 6)
    monkeypatch.setattr(run_module, "KEPT", 2)


@pytest.fixture
def command(checkpoint: str, files: Files, tmp_path: Path) -> Command:
    return (
        "tune", checkpoint, "--defense", "cmrm_dataset", *files.options, "--out", tmp_path / "o",
        "--trials", 5, "--budget", "10m", "--max-new-tokens", 8,
    )  # fmt: skip


def test_json_and_file_are_the_same(command: Command, tmp_path: Path) -> None:
    result = json_of(*command, "--json")
    assert read_tuned(tmp_path / "o" / "tune.json") == result
    assert result["schema"] == "cmrm-tune/1"
    assert [row["origin"] for row in result["trials"]] == [
        "default", "proxy", "proxy", "proxy", "search",
    ]  # fmt: skip
    assert result["trials"][0]["settings"]["alpha"] == 1.0
    assert result["chosen"] in result["frontier"] or result["chosen"] == 0
    assert result["proxy"]["unsafe"]["n"] == 5
    assert result["samples"] == {
        "harmful anchors": 12, "benign anchors": 12, "harmful": 8, "benign": 8, "questions": 4,
    }  # fmt: skip
    again = json_of(*command, "--json")
    assert again["trials"] == result["trials"]
    artifact = ShiftVectors.load(tmp_path / "o" / "shift.safetensors")
    assert artifact.recommended.alpha == result["settings"]["cmrm_dataset@tuned"]["alpha"]
    assert f"trial {result['chosen']} of cmrm_dataset" in " ".join(
        output("inspect", tmp_path / "o" / "shift.safetensors").split()
    )


def test_the_table(command: Command, tmp_path: Path) -> None:
    text = output(*command)
    for words in (
        "untouched", "chosen: trial", "runner-up", "default", "95 % Wilson intervals",
        "rank correlation of the proxy with unsafe", "5 settings measured", "tune.json",
        "--defenses cmrm_dataset@tuned", "shift.safetensors",
    ):  # fmt: skip
        assert words in text, words
    assert str(tmp_path) not in (tmp_path / "o" / "tune.json").read_text()


def test_limits_that_nothing_meets(command: Command, tmp_path: Path) -> None:
    one = [1 if part == 5 else part for part in command]
    strict = ("--max-over-refusal-gain", 0, "--max-accuracy-loss", 0)
    assert "no measured setting meets the limits; the nearest is trial 0" in refused(*one, *strict)
    result = read_tuned(tmp_path / "o" / "tune.json")
    assert (result["chosen"], result["nearest"]) == (None, 0)
    assert result["settings"] == {}
    assert not (tmp_path / "o" / "shift.safetensors").exists()


def test_bad_input_before_the_model_is_loaded(files: Files, tmp_path: Path) -> None:
    def ask(*more: object, defense: str = "cmrm_dataset") -> str:
        base = ("tune", tmp_path / "no model", "--defense", defense)
        return refused(*base, "--out", tmp_path / "o", *more)

    for budget in ("5", "0m", "soon", "-3m", "1d"):
        assert f"--budget is {budget!r}" in ask("--budget", budget)
    assert "unknown defence 'nonsense'" in ask(defense="nonsense")
    assert "no settings to tune" in ask(defense="ecso")
    assert "--anchors and --dev name" in ask("--anchors", files.anchors)
    assert "--max-accuracy-loss is 2.0" in ask("--max-accuracy-loss", 2)
    assert "unknown judge" in ask("--judges", "nobody")
    assert "at least 1" in ask("--batch-size", -1)
    assert "--anchors and --dev name" in ask("--dev", files.dev)
    assert "no model" in ask("--dev", files.dev, defense="coca"), "it needs no anchors"
    assert "12 anchors are asked in the dev set too" in ask(
        "--anchors", files.anchors, "--dev", f"{files.dev},{files.anchors}"
    )
    assert "8 dev samples are asked in a test set too" in ask(
        *files.options, "--test", only(files, tmp_path, "harmful")
    )
    assert "no benign samples" in ask(
        "--anchors", files.anchors, "--dev", only(files, tmp_path, "harmful")
    )
    assert not (tmp_path / "o").exists()


def only(files: Files, folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.jsonl"
    return path if path.exists() else write_set(path, list(rows("dev", kind, 8)))


def test_a_budget_that_is_too_small(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [0.0]

    def slow() -> float:
        seconds[0] += 30.0
        return seconds[0]

    monkeypatch.setattr(run_module, "monotonic", slow)
    small = [("30s" if part == "10m" else part) for part in command]
    assert "a budget of 30s is too small for one trial" in refused(*small)


def test_a_study_of_another_model(command: Command, tmp_path: Path) -> None:
    from tiny import tiny_model, tiny_processor

    output(*command)
    tiny_model(n_layers=4).save_pretrained(tmp_path / "other")
    tiny_processor().save_pretrained(tmp_path / "other")
    other = [tmp_path / "other" if k == 1 else part for k, part in enumerate(command)]
    assert "is a study of another model" in refused(*other)
    bare = ["coca" if part == "cmrm_dataset" else part for part in command]
    assert "is a study of another defence" in refused(*bare)


def test_the_demo_brings_its_own_sets(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cmrm.demo.vlm as demo_module
    import cmrm.tune.sets as sets_module

    monkeypatch.setattr(demo_module, "demo_checkpoint", lambda: Path(checkpoint))
    monkeypatch.setattr(sets_module, "demo_sets", lambda size: small_sets())
    out = ("--out", tmp_path / "o", "--trials", 2)
    result = json_of("tune", "demo", "--defense", "coca", *out, "--json")
    assert result["model"]["id"] == "demo"
    assert result["budget"] == 1200
    assert "go with --anchors and --dev" in refused(
        "tune", "demo", "--defense", "coca", "--test", "x.csv", *out
    )


def test_a_missing_library_is_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_module, "LIBRARIES", ("optuna", "no_such_library"))
    assert refused(*command) == (
        "`cmrm tune` needs no_such_library; install it with: pip install 'cmrm[tune]'"
    )


def test_times_and_settings_in_words() -> None:
    assert [parsed_budget(text) for text in ("90s", "1.5m", "2h")] == [90, 90, 7200]
    with pytest.raises(InputError):
        parsed_budget("1e3s")
    default = {"alpha": 1.0, "layers": None, "gate": False}
    assert setting_text({"alpha": 0.5, "layers": [1, 2, 5], "gate": False}, default) == (
        "alpha 0.5, decoder layers 1-2, 5"
    )
    assert setting_text(default, default) == ""


def scripted(how: str, after: int, *args: object) -> subprocess.CompletedProcess[str]:
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, str(tests / "tune" / "scripted.py"), how, str(after), *map(str, args)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def test_ctrl_c_and_kill_lose_one_trial_at_most(command: Command, tmp_path: Path) -> None:
    """Both ends in one study; it comes to what one call comes to."""
    stopped = scripted("interrupt", 9, *command)
    assert stopped.returncode == 130, stopped.stderr
    assert stopped.stderr.strip().endswith("cmrm: stopped; run the same command again to continue")
    killed = scripted("kill", 12, *command)
    assert killed.returncode == -9, killed.stderr
    study = json_of(*command, "--json")
    whole = json_of(*(tmp_path / "whole" if p == tmp_path / "o" else p for p in command), "--json")
    timeless = [[{**row, "seconds": 0} for row in r["trials"][:4]] for r in (study, whole)]
    for one, other in zip(*timeless, strict=True):
        assert one == other
    assert [row["number"] for row in study["trials"]] == [0, 1, 2, 3, 4]


def test_errors_of_the_schema(tmp_path: Path) -> None:
    for text, words in (
        ("{}", "schema is not cmrm-tune/1"), ("no", "holds no result"),
        (json.dumps({"schema": "cmrm-tune/1"}), "this is no result of `cmrm tune`: model"),
    ):  # fmt: skip
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(CmrmError, match=words):
            read_tuned(tmp_path / "t.json")


def test_help() -> None:
    assert "continues with the same" in " ".join(run("tune", "--help").output.split())
