"""`cmrm sweep`: every kind, its page, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.commands import json_of, output, refused
from cmrm.engines.transformers import TransformersEngine
from cmrm.report.sweep_page import sweep_table
from cmrm.sweep.schema import read_sweep
from cmrm.sweep.setups import ALPHAS
from tiny import tiny_model, tiny_processor
from tune.conftest import Files
from tune.scripted import answer
from tune.sources import rows, write_set

Command = list[Any]


@pytest.fixture(autouse=True)
def replies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TransformersEngine, "answer", answer)


@pytest.fixture
def command(checkpoint: str, files: Files, tmp_path: Path) -> Command:
    return [
        "sweep", checkpoint, *files.options, "--out", tmp_path / "o", "--max-new-tokens", 8,
        "--batch-size", 8, "--judges", "keyword", "--over",
    ]  # fmt: skip


def shares(result: dict[str, Any], figure: str, series: str) -> list[float]:
    return [
        point["rates"]["judges"]["keyword"][figure]["rate"]
        for point in result["points"]
        if point["series"] == series
    ]


def test_alpha_of_two_levels(command: Command, tmp_path: Path) -> None:
    names = ("--defenses", "cmrm_dataset,cmrm_sample")
    result = json_of(*command, "alpha", *names, "--json")
    assert read_sweep(tmp_path / "o" / "sweep.json") == result
    assert [p["x"] for p in result["points"]] == [*ALPHAS, *ALPHAS]
    for name in ("cmrm_dataset", "cmrm_sample"):
        unsafe, refused_too = (shares(result, f, name) for f in ("unsafe", "over_refusal"))
        assert unsafe[0] == 1.0, "alpha 0 leaves the model as it is"
        assert unsafe[-1] == 0.0
        assert unsafe == sorted(unsafe, reverse=True)
        assert refused_too == sorted(refused_too)
        assert all(point["settings"]["alpha"] == point["x"] for point in result["points"])
    untouched = result["references"]["image"]["judges"]["keyword"]["unsafe"]["rate"]
    assert untouched == 1.0
    assert result["references"]["text"]["accuracy"] is None
    assert result["samples"] == {
        "harmful": 8, "benign": 8, "questions": 4, "harmful anchors": 12, "benign anchors": 12,
    }  # fmt: skip
    page = (tmp_path / "o" / "sweep.html").read_text()
    assert "What alpha changes" in page
    assert page.count("<img") == 1
    assert "http" not in page
    assert str(tmp_path) not in page
    assert (tmp_path / "o" / "sweep.png").stat().st_size > 10_000
    text = output(*command, "alpha", *names, "--values", "0,2")
    assert "over-refusal (keyword)" in " ".join(text.split())


def test_layers(command: Command, tmp_path: Path) -> None:
    result = json_of(*command, "layers", "--values", "0,1", "--json")
    layers = [(p["x"], p["y"], p["settings"]["layers"]) for p in result["points"]]
    last = layers[-1][1]
    every = list(range(last + 1))
    assert layers == [(0, 0, [0]), (0, last, every), (1, last, every[1:])]
    assert (tmp_path / "o" / "sweep_cmrm_dataset.png").exists()
    ranges = json_of(*command, "layers", "--json")["points"]
    n = max(p["y"] for p in ranges) + 1
    assert len(ranges) == n * (n + 1) // 2
    assert all(p["settings"]["layers"] == list(range(p["x"], p["y"] + 1)) for p in ranges)


def test_numbers_of_anchors(command: Command) -> None:
    result = json_of(*command, "anchors", "--values", "4,12", "--draws", 2, "--json")
    assert [(p["x"], p["draw"]) for p in result["points"]] == [(4, 0), (4, 1), (12, 0)]
    assert all(p["rates"] for p in result["points"])
    table = sweep_table(result)
    assert "draw" in table.columns


def test_a_point_that_cannot_be_measured_says_why(command: Command, tmp_path: Path) -> None:
    ask = (*command, "anchors", "--defenses", "cmrm_gated", "--values", "1,12", "--draws", 1)
    result = json_of(*ask, "--json")
    failed, whole = result["points"]
    assert failed["rates"] is None
    assert "anchors" in failed["reason"]
    assert whole["reason"] is None
    assert failed["reason"][:30] in (tmp_path / "o" / "sweep.html").read_text()
    assert "no point could be measured" in refused(*ask[:-3], "1", "--draws", 1)


def test_perturbed_images(command: Command, tmp_path: Path) -> None:
    result = json_of(*command, "images", "--values", "jpeg:20,crop", "--json")
    places = [(p["series"], p["x"]) for p in result["points"]]
    names = ["unchanged", "jpeg 20", "crop 0.9", "crop 0.75", "crop 0.5"]
    assert places == [(series, x) for x in names for series in ("none", "cmrm_dataset")]
    assert result["references"]["image"] is None
    assert (tmp_path / "o" / "sweep.png").exists()


def test_corruptions(command: Command, tmp_path: Path) -> None:
    result = json_of(*command, "corruptions", "--values", "blank,noise", "--json")
    places = [(p["series"], p["x"], p["y"]) for p in result["points"]]
    assert len(places) == len(set(places)) == 3 * (1 + 2)
    used = {p["y"]: p["settings"]["corruption"] for p in result["points"] if p["y"] != "none"}
    assert used == {"blank": "blank", "noise": "noise"}
    assert (tmp_path / "o" / "sweep_cmrm_dataset.png").exists()


def test_sets(command: Command, files: Files, tmp_path: Path) -> None:
    asked = [*rows("dev", "harmful", 6), *rows("dev", "benign", 6)]
    texts = {row["id"]: row["query"].replace("flat", "house") for row in asked}
    other = write_set(
        tmp_path / "other.jsonl",
        [{**row, "id": "o" + row["id"], "query": texts[row["id"]]} for row in asked],
    )
    at = command.index("--dev") + 1
    base = [*command[:at], files.dev, *command[at + 1 :], "sets"]
    result = json_of(*base, "--json")
    assert [(p["series"], p["x"], p["y"]) for p in result["points"]] == [
        ("none", "dev", "none"), ("cmrm_dataset", "dev", "anchors"),
    ]  # fmt: skip
    own = [part for part in base if part not in ("--benign-anchors", files.benign)]
    same = [files.dev if part == files.anchors else part for part in own]
    halves = json_of(*same, "--json")
    assert halves["samples"]["harmful anchors"] < 8, "questions are no anchors"
    assert halves["samples"]["benign anchors"] > 0
    mixed = [files.dev if part == files.anchors else part for part in base]
    assert "has benign samples of its own" in refused(*mixed)
    empty = [files.benign if part == files.anchors else part for part in own]
    assert "leaves no harmful anchors" in refused(*empty)
    asked_only = write_set(tmp_path / "questions.jsonl", list(rows("dev", "question", 4)))
    first = [asked_only if part == files.dev else part for part in base]
    only = json_of(*first, "--json")
    assert only["samples"]["questions"] == 4
    assert halves["samples"]["harmful"] < 8, "a set on both sides is split"
    copied = write_set(tmp_path / "copied.jsonl", list(rows("dev", "harmful", 6)))
    leaking = [copied if part == files.anchors else part for part in base]
    assert "6 anchors of copied are asked in dev samples of dev too" in refused(*leaking)
    lists = json_of(
        *command[:2], "--anchors", f"{files.anchors},{other}", "--dev", other,
        *command[at + 1 :], "sets", "--json",
    )  # fmt: skip
    assert {p["y"] for p in lists["points"]} == {"none", "anchors", "other"}
    assert lists["samples"]["harmful"] < 6, "a set on both sides is split"


def test_artifacts_of_two_fine_tunes(
    command: Command,
    checkpoint: str,
    files: Files,
    tmp_path: Path,
) -> None:
    tuned = tiny_model()
    with torch.no_grad():
        tuned.get_output_embeddings().weight.mul_(1.01)
        for parameter in tuned.model.language_model.layers.parameters():
            parameter.mul_(1.02)
    tuned.save_pretrained(tmp_path / "tuned")
    tiny_processor().save_pretrained(tmp_path / "tuned")
    for model, name in ((checkpoint, "own"), (tmp_path / "tuned", "foreign")):
        output("extract", model, "--anchors", files.anchors, "-o", tmp_path / f"{name}.safetensors")
    shifts = ",".join(str(tmp_path / f"{name}.safetensors") for name in ("own", "foreign"))
    ask = (*command, "shifts", "--shifts", shifts)
    assert "does not fit" in refused(*ask)
    result = json_of(*ask, "--other-weights", "--json")
    assert [p["x"] for p in result["points"]] == ["own", "foreign"]
    assert all(p["rates"] for p in result["points"])
    elsewhere = [tmp_path / "p" if part == tmp_path / "o" else part for part in ask]
    assert "takes no artifact" in refused(*elsewhere, "--other-weights", "--defenses", "cast")
    assert "holds another one" in refused(*command, "alpha")
    leaking = ("extract", checkpoint, "--anchors", only_harmful(files, tmp_path))
    output(*leaking, "-o", tmp_path / "leak.safetensors")
    bare = [part for part in elsewhere if part not in ("--anchors", files.anchors)]
    bare = [tmp_path / "leak.safetensors" if part == shifts else part for part in bare]
    assert "was fitted on the dev set" in refused(*bare)


def only_harmful(files: Files, folder: Path) -> Path:
    return write_set(folder / "dev_harmful.jsonl", list(rows("dev", "harmful", 8)))


@pytest.mark.parametrize("turn", [1, -1])
def test_each_series_has_a_fit_of_its_own(command: Command, tmp_path: Path, turn: int) -> None:
    """Neither the order of the defences nor an earlier call decides what is measured."""
    settings = {
        "cmrm_gated@some": {"layers": [2]}, "cmrm_dataset@seq": {"schedule": "sequential"},
    }  # fmt: skip
    (tmp_path / "own.json").write_text(json.dumps(settings))
    names = ["cmrm_gated", "cmrm_gated@some", "cmrm_dataset", "cmrm_dataset@seq"][::turn]
    ask = (*command, "alpha", "--values", "1", "--settings", tmp_path / "own.json", "--defenses")
    together = json_of(*ask, ",".join(names), "--json")
    assert [point["reason"] for point in together["points"]] == [None] * 4
    (tmp_path / "o" / "sweep.json").unlink()
    whole = {point["series"]: point["rates"] for point in together["points"]}
    (tmp_path / "own.json").write_text(json.dumps({"cmrm_gated@some": {"layers": [2]}}))
    alone = json_of(*ask, "cmrm_gated@some", "--json")["points"][0]
    assert alone["rates"] == whole["cmrm_gated@some"]


def test_the_same_call_again_generates_nothing(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = json_of(*command, "alpha", "--values", "0.5,1", "--json")

    def broken(*args: Any, **more: Any) -> Any:
        raise AssertionError("generated again")

    monkeypatch.setattr(TransformersEngine, "answer", broken)
    again = json_of(*command, "alpha", "--values", "0.5,1", "--json")
    for point, other in zip(first["points"], again["points"], strict=True):
        assert point["rates"] == other["rates"]


def test_bad_input(command: Command, files: Files, tmp_path: Path) -> None:
    def ask(*more: object) -> str:
        return refused(*command, *more)

    assert "no number 'nonsense'" in ask("nonsense")
    assert "it has first_layer" in ask("alpha", "--defenses", "shiftdc")
    assert "'soon', which is no number" in ask("alpha", "--values", "soon")
    assert "'nan', which is no number" in ask("alpha", "--values", "nan")
    assert "alpha" in ask("alpha", "--values", "-1")
    assert "whole numbers" in ask("anchors", "--values", "1.5")
    assert "there are 12" in ask("anchors", "--values", "13")
    assert "within 0.." in ask("layers", "--values", "99")
    assert "no range of layers" in ask("layers", "--defenses", "coca")
    assert "not fitted on anchors" in ask("anchors", "--defenses", "coca")
    assert "estimates nothing with" in ask("corruptions", "--defenses", "cast")
    assert "unknown corruption 'fog'" in ask("corruptions", "--values", "fog")
    assert "unknown perturbation" in ask("images", "--values", "fog:1")
    assert "name both" in ask("shifts")
    assert "name both" in ask("alpha", "--shifts", files.dev)
    assert "goes with --over shifts" in ask("alpha", "--other-weights")
    assert "--values does not go with" in ask("sets", "--values", "1")
    assert "--limit is 0" in ask("alpha", "--limit", 0)
    assert "--draws is 0" in ask("alpha", "--draws", 0)
    assert "unknown defence" in ask("alpha", "--defenses", "nobody")
    assert "is a stack" in ask("alpha", "--defenses", "ecso+cmrm_dataset")
    (tmp_path / "stray.json").write_text('{"cast": {"alpha": 2}}')
    assert "cast, which is not among" in ask("alpha", "--settings", tmp_path / "stray.json")
    (tmp_path / "bad.json").write_text("[1]")
    assert "no mapping" in ask("alpha", "--settings", tmp_path / "bad.json")
    bare = [p for p in command if p not in ("--dev", files.dev)]
    assert "--anchors and --dev name" in refused(*bare, "alpha")
    assert "needs --anchors and --dev" in refused(*bare, "sets")
    assert not (tmp_path / "o" / "sweep.json").exists()
