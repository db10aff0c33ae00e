"""The artifact: what is in it, what it refuses, older formats, and damage of every kind."""

from __future__ import annotations

import json
import os
import random
import struct
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cmrm import Sample, ShiftVectors, Steering, estimate_shift, generate, steer
from cmrm.errors import ArtifactError, CmrmError
from cmrm.model.vlm import VLM
from cmrm.shift.artifact import Artifact, Provenance
from cmrm.shift.hub import card
from cmrm.shift.old_formats import old_config_hash

CASES = int(os.environ.get("CMRM_FUZZ", "10000"))


@pytest.fixture
def shift(vlm: VLM, anchors: list[Sample]) -> ShiftVectors:
    return estimate_shift(vlm, anchors)


def small_artifact() -> Artifact:
    generator = torch.Generator().manual_seed(4)
    vectors, direction = (torch.randn(3, 8, generator=generator) for _ in range(2))
    made = Provenance(
        "me/model",
        "abc",
        "Llava",
        8,
        3,
        "c" * 64,
        "a" * 64,
        5,
        "query",
        "blank",
        0,
        "pca",
        (1.0, 2.0, 3.0),
        (0.5, 0.6, 0.7),
        versions={"cmrm": "1"},
    )
    return Artifact(
        {"vectors": vectors, "direction": direction}, made, Steering(0.4, layers=(0, 2))
    )


def test_everything_survives_the_file(tmp_path: Path, shift: ShiftVectors) -> None:
    whole = replace(
        shift,
        recommended=Steering(0.7, "per_layer", "all", (0, 2), True),
        others={"direction": shift.vectors + 1},
    )
    loaded = ShiftVectors.load(whole.save(tmp_path / "a.safetensors"))
    assert torch.equal(loaded.vectors, whole.vectors)
    assert torch.equal(loaded.others["direction"], whole.others["direction"])
    assert (loaded.provenance, loaded.recommended) == (whole.provenance, whole.recommended)
    assert loaded.identity is not None
    assert whole.identity is not None
    assert loaded.identity.key == whole.identity.key
    again = loaded.save(tmp_path / "b.safetensors")
    assert again.read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_the_state_of_a_defence_is_the_same_format(tmp_path: Path) -> None:
    artifact = replace(
        small_artifact(), tensors={"direction": torch.ones(3, 8), "bias": torch.zeros(2)}
    )
    loaded = Artifact.load(artifact.save(tmp_path / "state.safetensors"))
    assert set(loaded.tensors) == {"direction", "bias"}
    with pytest.raises(ArtifactError, match="no shift vectors"):
        ShiftVectors.load(tmp_path / "state.safetensors")


def test_no_local_path_is_written(tmp_path: Path, vlm: VLM, anchors: list[Sample]) -> None:
    local = replace(vlm, model_id=str(tmp_path / "secret_project" / "llava"))
    shift = estimate_shift(local, anchors)
    content = shift.save(tmp_path / "shift.safetensors").read_bytes()
    assert b"secret_project" not in content
    assert b"llava" in content
    assert "secret_project" not in card(shift.provenance, shift.recommended)


def test_mean_and_cosine_are_recorded_and_a_poor_direction_is_warned_of() -> None:
    from cmrm.shift.estimate import _warn_of_small_cosines
    from cmrm.shift.moments import Moments

    generator = torch.Generator().manual_seed(0)
    wide = torch.zeros(400, 1, 16)
    wide[:, 0, 0] = 10 * torch.randn(400, generator=generator)
    wide[:, 0, 0] -= wide[:, 0, 0].mean()
    wide[:, 0, 1] = 1.0
    moments = Moments(1, 16)
    moments.update(wide)
    estimate = moments.estimate("pca")
    assert float(estimate.explained[0]) > 0.9
    assert float(estimate.mean_norms[0]) == pytest.approx(1.0, abs=1e-4)
    assert float(estimate.mean_cosine[0].abs()) < 0.1
    with pytest.warns(UserWarning, match="little to do with the mean"):
        _warn_of_small_cosines(estimate, "pca")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _warn_of_small_cosines(moments.estimate("mean"), "mean")


def test_what_the_sketch_dropped_is_recorded(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    import cmrm.shift.summary
    from cmrm.shift.moments import Moments

    image = Image.new("RGB", (16, 16), "red")
    anchors = [Sample(f"s{k}", f"Tell me {k} times" + "!" * (k % 5), image) for k in range(40)]
    assert estimate_shift(vlm, anchors).provenance.dropped_ratio == (0.0, 0.0, 0.0)

    class Small(Moments):
        def __init__(self, n_layers: int, hidden_size: int) -> None:
            super().__init__(n_layers, hidden_size, limit=3)

    monkeypatch.setattr(cmrm.shift.summary, "Moments", Small)
    dropped = estimate_shift(vlm, anchors).provenance.dropped_ratio
    assert all(0 < value < 1 for value in dropped)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: replace(a, tensors={"vectors": a.tensors["vectors"].double()}), "float64"),
        (lambda a: replace(a, tensors={"vectors": a.tensors["vectors"][:2]}), "provenance says"),
        (lambda a: replace(a, tensors={"vectors": torch.full((3, 8), float("nan"))}), "NaN"),
        (lambda a: replace(a, tensors={"direction": torch.ones(3, 9)}), "direction are"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_refused(change: Any, reason: str) -> None:
    with pytest.raises(ArtifactError, match=reason):
        change(small_artifact())


def old_shift_file(path: Path, vlm: VLM, shift: ShiftVectors) -> Path:
    """A file as the first version wrote it."""
    kept = {
        "model_id",
        "revision",
        "architecture",
        "hidden_size",
        "n_layers",
        "anchor_hash",
        "n_anchors",
        "text_condition",
        "corruption",
        "seed",
        "estimator",
        "norms",
        "explained_ratio",
        "versions",
        "licence_note",
    }
    provenance = {k: v for k, v in asdict(shift.provenance).items() if k in kept}
    provenance["config_hash"] = old_config_hash(vlm)
    content = {
        "format": "cmrm-shift/1",
        "provenance": provenance,
        "recommended": asdict(Steering(0.4)),
    }
    save_file({"vectors": shift.vectors}, str(path), metadata={"cmrm": json.dumps(content)})
    return path


def test_a_file_of_the_first_version_still_loads(
    tmp_path: Path, vlm: VLM, shift: ShiftVectors
) -> None:
    with pytest.warns(UserWarning, match="older cmrm"):
        old = ShiftVectors.load(old_shift_file(tmp_path / "old.safetensors", vlm, shift))
    assert torch.equal(old.vectors, shift.vectors)
    assert old.recommended.alpha == 0.4
    old.check(vlm)
    stranger = replace(old, provenance=replace(old.provenance, config_hash="0" * 64))
    with pytest.raises(ArtifactError, match="extract it again"):
        stranger.check(vlm)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [("shiftdc", "safety", "direction"), ("refusal_direction", "refusal", "direction")],
)
def test_a_defences_state_of_the_first_version_still_loads(
    tmp_path: Path, vlm: VLM, name: str, old: str, new: str
) -> None:
    from cmrm.defenses import make_defense
    from cmrm.engines.transformers import TransformersEngine

    path = tmp_path / f"{name}.safetensors"
    tensor = torch.randn(vlm.n_layers, vlm.hidden_size)
    save_file(
        {old: tensor},
        str(path),
        metadata={"cmrm": f"cmrm-defense/1\n{name}\n{old_config_hash(vlm)}"},
    )
    defense = make_defense(name)
    defense.load(path, TransformersEngine(vlm))
    assert torch.equal(defense.fitted(new), tensor)


def outcome(path: Path) -> Artifact | None:
    """The artifact, or None for one clear error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Artifact.load(path)
    except CmrmError as error:
        message = str(error)
    assert len(message) < 600
    assert "\n" not in message
    return None


def same(a: Artifact, b: Artifact) -> bool:
    return (
        set(a.tensors) == set(b.tensors)
        and all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
        and (a.provenance, a.recommended) == (b.provenance, b.recommended)
    )


def test_damage_never_loads_as_something_else(tmp_path: Path) -> None:
    """Bytes changed, removed, repeated: the very artifact, or one line."""
    path = tmp_path / "a.safetensors"
    artifact = small_artifact()
    content = artifact.save(path).read_bytes()
    rng = random.Random(11)
    loaded = 0
    for _ in range(CASES):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            place = rng.randrange(len(damaged))
            kind = rng.randrange(5)
            if kind == 0:
                damaged[place] ^= 1 << rng.randrange(8)
            elif kind == 1:
                damaged[place] = rng.randrange(256)
            elif kind == 2:
                del damaged[place : place + rng.choice([1, 4, 40])]
            elif kind == 3:
                damaged[place:place] = bytes(damaged[place : place + rng.choice([1, 8])])
            else:
                digits = [k for k, byte in enumerate(damaged) if 48 <= byte <= 57]
                damaged[rng.choice(digits)] = rng.randrange(48, 58)
            if not damaged:
                break
        path.write_bytes(bytes(damaged))
        survivor = outcome(path)
        if survivor is not None:
            loaded += 1
            assert same(survivor, artifact), "a damaged file was taken for another artifact"
    assert loaded < CASES


def test_a_header_that_lies_about_its_numbers_is_refused(tmp_path: Path) -> None:
    path = small_artifact().save(tmp_path / "a.safetensors")
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + size].replace(b'\\"alpha\\": 0.4', b'\\"alpha\\": 0.9')
    assert header != content[8 : 8 + size]
    path.write_bytes(content[:8] + header + content[8 + size :])
    with pytest.raises(ArtifactError, match="damaged"):
        Artifact.load(path)


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 8, b"{}", b"\xff" * 64, b'{"format": "cmrm-artifact/2"}']
)
def test_files_of_another_kind_are_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ArtifactError):
        Artifact.load(path)
    with pytest.raises(ArtifactError, match="no artifact at"):
        Artifact.load(tmp_path / "nowhere")


def test_an_artifact_of_another_model_steers_nothing(
    vlm: VLM, shift: ShiftVectors, anchors: list[Sample]
) -> None:
    from cmrm import wrap_vlm
    from tiny import tiny_model, tiny_processor

    other = wrap_vlm(tiny_model(), tiny_processor(), model_id="other")
    for weight in other.model.parameters():
        weight.data.mul_(1.5)
    for use in (
        lambda: steer(other, shift),
        lambda: generate(other, anchors[:1], shift=shift, max_new_tokens=1),
    ):
        with pytest.raises(ArtifactError, match="other weights"):
            use()


def test_an_artifact_is_as_readable_as_any_other_file(shift: ShiftVectors, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("x")
    assert shift.save(tmp_path / "a.safetensors").stat().st_mode == other.stat().st_mode
