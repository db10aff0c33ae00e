"""`cmrm extract`: what it writes, what it leaves, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from cli.commands import json_of, output, refused, run
from cmrm import ShiftVectors
from cmrm.errors import ArtifactError
from cmrm.shift.artifact import Artifact
from cmrm.shift.checkpoint import remove_checkpoint


def test_the_options_are_stored_as_the_recommended_setting(artifact: Path) -> None:
    stored = ShiftVectors.load(artifact)
    assert (stored.recommended.alpha, stored.recommended.layers) == (0.5, (0, 1))
    assert stored.provenance.estimator == "pca"


def test_json_states_data_and_provenance(checkpoint: str, data: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "shift.safetensors"
    content = json_of("extract", checkpoint, "--anchors", data, "-o", target, "--json")
    assert content["artifact"] == str(target)
    assert content["data"]["n"] == 4
    assert content["provenance"]["n_anchors"] == 4


def test_no_checkpoint_is_left_beside_a_finished_artifact(
    checkpoint: str, data: Path, tmp_path: Path
) -> None:
    target = tmp_path / "shift.safetensors"
    assert "4 anchors, 3 layers" in output("extract", checkpoint, "--anchors", data, "-o", target)
    assert [path.name for path in tmp_path.iterdir()] == ["shift.safetensors"]


def test_the_checkpoint_stays_until_the_artifact_is_on_disk(
    checkpoint: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An artifact that cannot be written costs no forward pass twice."""
    target = tmp_path / "shift.safetensors"
    save = Artifact.save

    def full(artifact: Artifact, path: str | Path) -> Path:
        raise ArtifactError("no space left on device")

    monkeypatch.setattr(Artifact, "save", full)
    args = ("extract", checkpoint, "--anchors", data, "-o", target)
    assert "no space left" in refused(*args)
    assert (tmp_path / "shift.safetensors.partial").exists()

    monkeypatch.setattr(Artifact, "save", save)

    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("an anchor was run again")

    monkeypatch.setattr(LlamaDecoderLayer, "forward", never)
    output(*args)
    assert [path.name for path in tmp_path.iterdir()] == ["shift.safetensors"]


def test_checkpoints_of_several_processes_are_removed(tmp_path: Path) -> None:
    checkpoint = tmp_path / "shift[1].safetensors.partial"
    parts = ("0", "1", "benign", "sequential", "0.benign", "1.sequential", "txt")
    others = [tmp_path / f"shift[1].safetensors.partial.{part}" for part in parts]
    for file in (checkpoint, *others):
        file.touch()
    remove_checkpoint(checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["shift[1].safetensors.partial.txt"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--estimator", "median"], "estimator"),
        (["--corruption", "sepia"], "corruption"),
        (["--alpha", "-1"], "alpha"),
        (["--layers", "0-9"], "out of range"),
        (["--layers", "a"], "neither a layer nor a range"),
        (["--schedule", "x"], "schedule"),
        (["--limit", "1"], "at least 2"),
        (["--limit", "0"], "limit"),
        (["--on-error", "maybe"], "on_error"),
        (["--map", "query=nope"], "nope"),
        (["--split", "train"], "neither splits nor configurations"),
        (["--dtype", "int3"], "dtype"),
        (["--batch-size", "0"], "batch_size"),
    ],
)
def test_wrong_options(
    checkpoint: str, data: Path, tmp_path: Path, args: list[str], words: str
) -> None:
    target = tmp_path / "x.safetensors"
    assert words in refused("extract", checkpoint, "--anchors", data, "-o", target, *args)
    assert not target.exists()


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_run(
    data: Path, tmp_path: Path
) -> None:
    inside = tmp_path / "folder" / "file"
    inside.parent.mkdir()
    inside.write_text("x")
    args = ("extract", tmp_path / "no model", "--anchors", data, "-o")
    assert "is a folder" in refused(*args, inside.parent)
    assert "cannot write" in refused(*args, inside / "shift.safetensors")
    assert inside.read_text() == "x"


def test_help_names_every_option() -> None:
    assert "--corruption" in run("extract", "--help").output
