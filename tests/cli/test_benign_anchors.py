"""`cmrm extract --benign`: what it fits, says, and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.commands import json_of, output, refused, run
from cmrm import ShiftVectors, Steering
from cmrm.cli import screen
from cmrm.shift.artifact import Artifact


@pytest.fixture
def command(checkpoint: str, both_kinds: tuple[Path, Path], tmp_path: Path) -> tuple[Any, ...]:
    harmful, benign = both_kinds
    target = tmp_path / "x.safetensors"
    return ("extract", checkpoint, "--anchors", harmful, "--benign", benign, "-o", target)


@pytest.fixture
def alone(checkpoint: str, both_kinds: tuple[Path, Path], tmp_path: Path) -> tuple[Any, ...]:
    """The same without benign anchors."""
    target = tmp_path / "x.safetensors"
    return ("extract", checkpoint, "--anchors", both_kinds[0], "-o", target)


def test_everything_is_fitted_and_nothing_is_left_beside_it(
    command: tuple[Any, ...], tmp_path: Path
) -> None:
    content = json_of(*command, "--json")
    shift = ShiftVectors.load(tmp_path / "x.safetensors")
    assert shift.gate is not None
    assert shift.direction is not None
    assert shift.sequential is not None
    assert content["benign"]["n"] == 12
    assert content["provenance"]["n_benign"] == 12
    assert content["provenance"]["benign_share"] == 0
    assert content["records"] == shift.records
    assert content["recommended"] == shift.recommended.to_json()
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_checkpoints_of_all_parts_stay_until_the_artifact_is_on_disk(
    command: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: Artifact, path: str | Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Artifact, "save", stopped)
    run(*command)
    parts = {path.name for path in tmp_path.iterdir()}
    assert {"x.safetensors.partial", "x.safetensors.partial.benign"} <= parts
    monkeypatch.undo()
    output(*command)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_sentences_say_what_is_recommended_and_why(
    command: tuple[Any, ...], tmp_path: Path
) -> None:
    text = output(*command)
    records = ShiftVectors.load(tmp_path / "x.safetensors").records
    assert "12 harmful and 12 benign anchors, 3 layers" in text
    assert f"why: {records['gap']['reason']}" in text
    assert f"gate: reads decoder layer {records['gate']['layer']} (AUC " in text
    assert "(5.0 % were asked for)" in text
    assert "gate on image questions: not measured" in text
    assert "--benign" not in text


def test_without_benign_anchors_one_line_says_what_they_would_add(alone: tuple[Any, ...]) -> None:
    lines = [line for line in output(*alone).splitlines() if "--benign" in line]
    assert len(lines) == 1
    assert "a harm gate" in lines[0]


def test_mixed_anchors_are_recorded(command: tuple[Any, ...], tmp_path: Path) -> None:
    content = json_of(*command, "--mixed", "--json")
    assert content["provenance"]["benign_share"] == 0.5
    plain = json_of(*command, "--json")
    assert plain["provenance"]["norms"] != content["provenance"]["norms"]


def test_image_questions_are_counted(
    command: tuple[Any, ...], both_kinds: tuple[Path, Path], tmp_path: Path
) -> None:
    text = output(*command, "--questions", both_kinds[0])
    record = ShiftVectors.load(tmp_path / "x.safetensors").records["gate"]
    assert record["n_questions"] == 12
    assert f"it opens for {100 * record['questions']:.1f} % of 12" in text


def test_options_are_the_recommended_setting(command: tuple[Any, ...], tmp_path: Path) -> None:
    target = tmp_path / "x.safetensors"
    text = output(*command, "--schedule", "sequential", "--gate", "--alpha", 0.5)
    shift = ShiftVectors.load(target)
    assert shift.recommended == Steering(alpha=0.5, schedule="sequential", gate=True)
    assert shift.gate is not None
    above = tuple(range(shift.gate.layers[-1] + 1, 3))
    assert shift.provenance.sequential_layers == above
    assert "recommended, as the options say: sequential vectors are added" in text
    assert "where the gate opens" in text
    output(*command, "--operator", "fill")
    assert ShiftVectors.load(target).recommended == Steering(operator="fill")


def test_a_gate_alone_is_added_to_what_the_anchors_recommend(
    command: tuple[Any, ...], tmp_path: Path
) -> None:
    plain = json_of(*command, "--json")["recommended"]
    gated = json_of(*command, "--gate", "--json")["recommended"]
    assert gated == {**plain, "gate": True, "layers": None}
    assert json_of(*command, "--no-gate", "--json")["recommended"] == plain


def test_sequential_vectors_need_no_benign_anchors(alone: tuple[Any, ...]) -> None:
    content = json_of(*alone, "--schedule", "sequential", "--layers", "1-2", "--json")
    assert content["provenance"]["sequential_layers"] == [1, 2]
    assert content["records"] == {}


def test_the_bar_counts_every_prompt_of_every_part(
    command: tuple[Any, ...], both_kinds: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[list[Any]] = []

    class Bar:
        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None:
            return None

        def begin(self, step: str, total: int | None) -> None:
            parts.append([step, total, 0])

        def advance(self, n: int) -> None:
            parts[-1][2] += n

    monkeypatch.setattr(screen, "reporter", Bar)
    output(*command, "--questions", both_kinds[0])
    assert [name for name, _, _ in parts] == [
        "states of anchors", "states of benign anchors", "states of image questions",
        "sequential vectors",
    ]  # fmt: skip
    assert all(total == counted > 0 for _, total, counted in parts)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--gate"], "--gate needs benign anchors"),
        (["--operator", "fill"], "--operator fill needs benign anchors"),
        (["--mixed", "--questions", "q.csv"], "--mixed and --questions need benign anchors"),
        (["--false-alarms", "0.1"], "--false-alarms needs benign anchors"),
        (["--false-alarms", "0"], "between 0 and 1"),
    ],
)
def test_what_benign_anchors_are_needed_for(
    alone: tuple[Any, ...], args: list[str], words: str
) -> None:
    assert words in refused(*alone, *args)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--false-alarms", "0"], "false_alarms is 0.0; it is a share between 0 and 1"),
        (["--false-alarms", "2"], "false_alarms is 2.0; it is a share between 0 and 1"),
        (["--operator", "pour"], "operator is 'pour'; one of add, fill"),
        (["--operator", "fill", "--schedule", "sequential"], "leave one of the two out"),
        (["--operator", "fill", "--positions", "all"], "positions last_prompt"),
        (["--schedule", "sequential", "--positions", "all"], "choose last or last_prompt"),
        (["--gate", "--positions", "all"], "a gate decides at the last prompt token"),
        (["--gate", "--layers", "0-2"], "leave layer 0 out"),
        (["--limit", "9"], "9 harmful and 9 benign anchors were given"),
        (["--benign", "nowhere.csv"], "nowhere.csv"),
        (["--questions", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_wrong_options(
    command: tuple[Any, ...], tmp_path: Path, args: list[str], words: str
) -> None:
    assert words in refused(*command, *args)
    assert not (tmp_path / "x.safetensors").exists()


def test_wrong_anchors_are_refused_before_the_model_is_loaded(
    both_kinds: tuple[Path, Path], tmp_path: Path
) -> None:
    harmful, benign = both_kinds
    rows = [json.loads(line) for line in benign.read_text().splitlines()]

    def changed(name: str, **fields: Any) -> Path:
        file = benign.parent / name
        lines = [json.dumps({**row, **fields}) for row in rows]
        file.write_text("\n".join(lines), encoding="utf-8")
        return file

    def problem(*more: Any) -> str:
        return refused(
            "extract", tmp_path / "no model", "-o", tmp_path / "x", "--anchors", harmful, *more
        )

    blind = changed("blind.jsonl", image=None)
    assert "12 of 12 benign anchors have no image" in problem("--benign", blind)
    assert "12 of 12 questions of" in problem("--benign", benign, "--questions", blind)
    assert "12 anchors stand among the harmful and among the benign" in problem("--benign", harmful)
    mislabelled = changed("mislabelled.jsonl", label="harmful")
    assert "are labelled harmful" in problem("--benign", mislabelled)
