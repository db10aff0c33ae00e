"""The artifact with a gate and records: what survives damage, and files from before there were
any."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from cmrm import ShiftVectors, Steering
from cmrm.errors import ArtifactError, CmrmError
from cmrm.shift.artifact import Artifact, Provenance, _digest
from cmrm.steering.gate import Gate

RECORDS = {
    "gap": {"lost": 0.4, "low": 0.3, "high": 0.5, "text_auc": 0.9, "reason": "why"},
    "gate": {
        "layer": 1, "auc": [0.5, 0.9, 0.9], "wanted_false_alarms": 0.05, "false_alarms": 0.05,
        "recall": 0.9, "n_harmful": 12, "n_benign": 12, "curve": [], "questions": None,
        "n_questions": 0,
    },
}  # fmt: skip


def whole(*, metric: bool = False) -> Artifact:
    generator = torch.Generator().manual_seed(4)
    tensors = {
        name: torch.randn(3, 8, generator=generator)
        for name in ("vectors", "direction", "sequential")
    }
    gate = Gate(
        "vocabulary" if metric else "linear",
        (0, 1),
        torch.randn(2, 8, generator=generator),
        0.625,
        weights=(0.25, 0.75),
        bias=-0.125,
        metric=torch.eye(8) if metric else None,
    )
    made = Provenance("me/model", "abc", "Llava", 8, 3, n_anchors=12, n_benign=12,
                      sequential_layers=(2,))  # fmt: skip
    setting = Steering(schedule="sequential", gate=True)
    return Artifact(tensors, made, setting, gate=gate, records=RECORDS)


def parts(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(str(path), "pt") as handle:
        content = json.loads((handle.metadata() or {})["cmrm"])
        return content, {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118


def written(path: Path, content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    path.write_bytes(save(tensors, metadata={"cmrm": json.dumps(content, sort_keys=True)}))
    return path


@pytest.mark.parametrize("metric", [False, True])
def test_gate_and_records_survive_the_file(tmp_path: Path, metric: bool) -> None:
    artifact = whole(metric=metric)
    path = artifact.save(tmp_path / "a.safetensors")
    loaded = Artifact.load(path)
    assert loaded.gate is not None
    assert artifact.gate is not None
    assert loaded.gate.key == artifact.gate.key
    assert loaded.records == artifact.records
    assert (loaded.provenance, loaded.recommended) == (artifact.provenance, artifact.recommended)
    assert set(loaded.tensors) == {"vectors", "direction", "sequential"}
    assert ShiftVectors.load(path).save(tmp_path / "b.safetensors").read_bytes() == (
        path.read_bytes()
    )


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": 0.5},
        {"bias": 0.125},
        {"weights": [0.75, 0.25]},
        {"layers": [0, 2]},
        {"kind": "cosine"},
    ],
)
def test_changed_numbers_of_a_gate_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    content, tensors = parts(whole().save(tmp_path / "a.safetensors"))
    content["gate"] = {**content["gate"], **change}
    with pytest.raises(ArtifactError, match="does not match its digest"):
        Artifact.load(written(tmp_path / "b.safetensors", content, tensors))


@pytest.mark.parametrize("name", ["gate.vectors", "gate.metric", "sequential", "direction"])
def test_changed_tensors_are_refused(tmp_path: Path, name: str) -> None:
    content, tensors = parts(whole(metric=True).save(tmp_path / "a.safetensors"))
    tensor = tensors[name]
    for changed in (tensor + 0.5, tensor.flip(0), tensor.reshape(-1)):
        other = {**tensors, name: changed}
        with pytest.raises(ArtifactError, match="does not match its digest"):
            Artifact.load(written(tmp_path / "b.safetensors", content, other))
    without = {key: tensor for key, tensor in tensors.items() if key != name}
    with pytest.raises(ArtifactError, match="does not match its digest"):
        Artifact.load(written(tmp_path / "b.safetensors", content, without))


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": float("nan")},
        {"threshold": "high"},
        {"layers": [1, 5]},
        {"layers": [0]},
        {"weights": []},
        {"kind": "guess"},
        {"odd": 1},
        [],
    ],
)
def test_a_gate_that_means_nothing_is_one_line_even_with_its_digest(
    tmp_path: Path, change: Any
) -> None:
    content, tensors = parts(whole().save(tmp_path / "a.safetensors"))
    content["gate"] = {**content["gate"], **change} if isinstance(change, dict) else change
    content.pop("digest")
    content["digest"] = _digest(content, tensors)
    path = written(tmp_path / "b.safetensors", content, tensors)
    with pytest.raises(ArtifactError) as caught:
        Artifact.load(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_damage_never_loads_as_something_else(tmp_path: Path) -> None:
    artifact, path = whole(metric=True), tmp_path / "a.safetensors"
    content = artifact.save(path).read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    rng = random.Random(12)
    assert artifact.gate is not None
    for number in range(1500):
        damaged = bytearray(content)
        low, high = (8, 8 + size) if number % 2 else (8 + size, len(content))
        damaged[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(damaged))
        try:
            loaded = Artifact.load(path)
        except CmrmError:
            continue
        assert loaded.gate is not None
        assert loaded.gate.key == artifact.gate.key
        assert loaded.records == artifact.records
        assert loaded.recommended == artifact.recommended


def test_a_file_from_before_there_were_gates_still_loads(tmp_path: Path) -> None:
    """Of the same format, with neither a gate nor records, operator or benign anchors."""
    bare = replace(whole(), gate=None, records={}, recommended=Steering(0.4))
    content, tensors = parts(bare.save(tmp_path / "a.safetensors"))
    for name in ("gate", "records", "digest"):
        del content[name]
    for name in ("operator", "gate"):
        del content["recommended"][name]
    for name in ("n_benign", "benign_hash", "benign_share", "sequential_layers"):
        del content["provenance"][name]
    del tensors["sequential"]
    content["digest"] = _digest(content, tensors)
    loaded = ShiftVectors.load(written(tmp_path / "old.safetensors", content, tensors))
    assert (loaded.gate, loaded.records, loaded.sequential) == (None, {}, None)
    assert loaded.recommended == Steering(0.4)
    assert loaded.provenance.sequential_layers == ()


def test_a_gate_of_another_shape_is_refused() -> None:
    artifact = whole()
    assert artifact.gate is not None
    for gate in (
        replace(artifact.gate, vectors=torch.ones(2, 9)),
        replace(artifact.gate, layers=(0, 3)),
    ):
        with pytest.raises(ArtifactError, match="the gate is one of a model of another shape"):
            replace(artifact, gate=gate)
