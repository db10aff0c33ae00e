"""`cmrm generate`: levels, JSON, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cli.commands import json_of, output, refused
from families import byte_tokenizer, text_settings


@pytest.fixture
def image(data: Path) -> Path:
    return data.parent / "red.png"


def test_dataset_level(checkpoint: str, image: Path, artifact: Path) -> None:
    content = json_of("generate", checkpoint, "hello", "--image", image, "--shift", artifact,
                      "--alpha", 2, "--max-new-tokens", 6, "--json")  # fmt: skip
    assert content["level"] == "dataset"
    assert content["steering"]["alpha"] == 2
    assert content["tokens"] >= 1


def test_an_artifact_is_a_file_or_a_folder(checkpoint: str, image: Path, artifact: Path) -> None:
    command = ("generate", checkpoint, "hello", "--image", image, "--max-new-tokens", 3, "--json")
    by_file = json_of(*command, "--shift", artifact)
    assert json_of(*command, "--shift", artifact.parent) == by_file


def test_sample_level(checkpoint: str, image: Path) -> None:
    content = json_of("generate", checkpoint, "hello", "--image", image, "--sample-level",
                      "--max-new-tokens", 3, "--json")  # fmt: skip
    assert content["level"] == "sample"


def test_without_an_image_nothing_is_steered(checkpoint: str, artifact: Path) -> None:
    plain = output("generate", checkpoint, "hello", "--max-new-tokens", 6)
    text = json_of(
        "generate", checkpoint, "hello", "--shift", artifact, "--max-new-tokens", 6, "--json"
    )
    assert text["level"] is None
    assert text["reply"] == plain.strip()


def test_wrong_options(checkpoint: str, artifact: Path, tmp_path: Path) -> None:
    assert "there is no image" in refused(
        "generate", checkpoint, "q", "--image", tmp_path / "no.png"
    )
    assert "choose one" in refused(
        "generate", checkpoint, "q", "--shift", artifact, "--sample-level"
    )
    assert "go with --shift" in refused("generate", checkpoint, "q", "--alpha", 1)
    assert "no artifact" in refused("generate", checkpoint, "q", "--shift", tmp_path / "none")
    assert "cannot load" in refused("generate", tmp_path / "nothing", "q")
    assert "prompt is empty" in refused("generate", checkpoint, " ")
    assert "go with it" in refused("generate", "demo", "q", "--revision", "main")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(checkpoint: str) -> None:
    assert "cannot load" in refused("generate", checkpoint, "q", "--device-map", "cuda")


def test_a_text_only_model(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**text_settings())).save_pretrained(tmp_path)
    byte_tokenizer(image_token="<image>").save_pretrained(tmp_path)
    assert "text-only" in refused("generate", tmp_path, "q")
