"""`cmrm inspect` on artifacts of every kind that the format holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from cli.commands import json_of, output, refused
from cmrm import ShiftVectors
from cmrm.engines.transformers import TransformersEngine
from cmrm.model.vlm import VLM


def test_provenance_setting_and_figures_by_layer(artifact: Path) -> None:
    text = output("inspect", artifact)
    for words in ("recommended alpha", "norm of the mean", "cosine to the mean", "dropped share"):
        assert words in text
    assert any(bar in text for bar in "▂▃▄▅▆▇█")


def test_the_model_that_it_is_bound_to(artifact: Path) -> None:
    assert "identity: dtypes" in output("inspect", artifact)
    identity = json_of("inspect", artifact, "--json")["identity"]
    assert identity["architecture"] == "LlavaForConditionalGeneration"
    assert sum(identity["dtypes"].values()) == identity["tensors"] > 0


def test_json_holds_every_field(artifact: Path) -> None:
    content = json_of("inspect", artifact, "--json")
    assert len(content["provenance"]["norms"]) == 3
    assert len(content["provenance"]["mean_cosine"]) == 3
    assert content["recommended"]["alpha"] == 0.5
    assert content["tensors"] == {"vectors": [3, 32]}


def test_other_tensors_of_the_artifact(artifact: Path, tmp_path: Path) -> None:
    shift = ShiftVectors.load(artifact)
    both = replace(shift, others={"direction": torch.ones(3, 32)})
    both.save(tmp_path / "both.safetensors")
    assert "tensor direction" in output("inspect", tmp_path / "both.safetensors")


def test_fitted_state_of_a_defence(vlm: VLM, tmp_path: Path) -> None:
    """It has no vectors, no recommended setting and no figures by layer."""
    file = tmp_path / "fitted.safetensors"
    TransformersEngine(vlm).artifact({"basis": torch.ones(2, 32)}, "null_space").save(file)
    text = output("inspect", file)
    assert "null_space" in text
    assert "tensor basis" in text
    assert "recommended" not in text
    assert "by decoder layer" not in text


def test_a_folder_with_an_artifact(artifact: Path) -> None:
    assert "recommended alpha" in output("inspect", artifact.parent)


def test_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert "not a whole artifact" in refused("inspect", tmp_path / "empty")
    assert "there is no artifact" in refused("inspect", tmp_path / "none")
