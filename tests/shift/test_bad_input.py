"""Every mistake gets one clear error that names the cause and the remedy."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from cmrm import Sample, ShiftVectors, Steering, estimate_shift, generate, load_vlm, steer, wrap_vlm
from cmrm.errors import ArtifactError, InputError, ModelError
from cmrm.model.encode import encode
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request
from tiny import tiny_model


@pytest.fixture
def shift(vlm: VLM, anchors: list[Sample]) -> ShiftVectors:
    return estimate_shift(vlm, anchors)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_anchors(vlm: VLM, anchors: list[Sample], n: int) -> None:
    with pytest.raises(InputError, match="at least 2"):
        estimate_shift(vlm, anchors[:n])


def test_repeated_anchor_id(vlm: VLM, anchors: list[Sample]) -> None:
    with pytest.raises(InputError, match="two samples have the id"):
        estimate_shift(vlm, [anchors[0], anchors[0]])


def test_unknown_estimator_and_corruption(vlm: VLM, anchors: list[Sample]) -> None:
    with pytest.raises(InputError, match="estimator"):
        estimate_shift(vlm, anchors, estimator="median")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="corruption"):
        estimate_shift(vlm, anchors, corruption="query")


@pytest.mark.parametrize("changes", [{"n_layers": 2}, {"width": 64}])
def test_artifact_of_another_model(
    shift: ShiftVectors, processor: object, changes: dict[str, int]
) -> None:
    other = wrap_vlm(tiny_model(**changes), processor)
    inputs = encode(other, [Request("q")])
    with pytest.raises(ArtifactError, match="does not fit"), steer(other, shift):
        other.model(**inputs)


def test_nan_in_a_vector(vlm: VLM, shift: ShiftVectors) -> None:
    bad = shift.vectors.clone()
    bad[1, 3] = float("nan")
    with pytest.raises(ArtifactError, match=r"layers \[1\]"):
        ShiftVectors(bad, shift.provenance, shift.recommended)
    with pytest.raises(InputError, match="NaN"), steer(vlm, bad):
        pass


def test_wrong_shape(vlm: VLM, shift: ShiftVectors) -> None:
    with pytest.raises(InputError, match="this model takes"), steer(vlm, shift.vectors[:2]):
        pass
    with pytest.raises(ArtifactError, match="the provenance says"):
        dataclasses.replace(shift, vectors=shift.vectors[:2])


@pytest.mark.parametrize("alpha", [-0.1, float("nan"), float("inf")])
def test_alpha_must_not_be_negative(vlm: VLM, shift: ShiftVectors, alpha: float) -> None:
    with pytest.raises(InputError, match="alpha"):
        Steering(alpha=alpha)
    with pytest.raises(InputError, match="alpha"), steer(vlm, shift, alpha=alpha):
        pass


@pytest.mark.parametrize("layers", [(3,), (-1,), (0, 99)])
def test_layer_out_of_range(vlm: VLM, shift: ShiftVectors, layers: tuple[int, ...]) -> None:
    with (
        pytest.raises(InputError, match=r"out of range|0-based decoder layers"),
        steer(vlm, shift, Steering(layers=layers)),
    ):
        pass


@pytest.mark.parametrize(
    "setting", [{"schedule": "cosine"}, {"positions": "middle"}, {"layers": ()}, {"layers": (1, 1)}]
)
def test_unknown_setting(setting: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Steering(**setting)  # type: ignore[arg-type]


def test_broken_artifacts(shift: ShiftVectors, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no"):
        ShiftVectors.load(tmp_path / "none.safetensors")
    whole = shift.save(tmp_path / "whole.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-50])
    with pytest.raises(ArtifactError, match="not a whole"):
        ShiftVectors.load(cut)
    from safetensors.torch import save_file

    for header in (
        "[]",
        "nonsense",
        '{"format": "cmrm-shift/1"}',
        '{"format": "cmrm-shift/1", "provenance": null}',
    ):
        save_file(
            {"vectors": torch.zeros(1, 2)}, tmp_path / "odd.safetensors", metadata={"cmrm": header}
        )
        with pytest.raises(ArtifactError, match=r"odd\.safetensors.*(not a whole|format)"):
            ShiftVectors.load(tmp_path / "odd.safetensors")
    save_file({"vectors": torch.zeros(1, 2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ArtifactError, match="format"):
        ShiftVectors.load(tmp_path / "foreign.safetensors")


def test_unwritable_output(shift: ShiftVectors, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("kept")
    with pytest.raises(ArtifactError, match="cannot write"):
        shift.save(blocked / "shift.safetensors")
    assert blocked.read_text() == "kept"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_bad_generation_options(vlm: VLM, anchors: list[Sample]) -> None:
    with pytest.raises(InputError, match="max_new_tokens"):
        generate(vlm, anchors, max_new_tokens=0)
    with pytest.raises(InputError, match="context"):
        generate(vlm, [Sample("long", "x" * 3000)], condition="query")


def test_not_a_vlm(processor: object, vlm: VLM, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load"):
        load_vlm(tmp_path / "nothing")
    with pytest.raises(ModelError, match="no tokenizer"):
        wrap_vlm(vlm.model, object())
    headless = tiny_model()
    headless.model.language_model.layers = torch.nn.ModuleList()
    with pytest.raises(ModelError, match="decoder layers"):
        wrap_vlm(headless, processor)
