"""Artifacts on the hub: what is uploaded, what comes back, what is said when it fails."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from cmrm import Sample, ShiftVectors, Steering, estimate_shift
from cmrm.errors import ArtifactError
from cmrm.model.vlm import VLM
from cmrm.shift.hub import FILE_NAME, card


@pytest.fixture
def shift(vlm: VLM, anchors: list[Sample]) -> ShiftVectors:
    return estimate_shift(vlm, anchors)


def test_upload_and_download(
    shift: ShiftVectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    remote = tmp_path / "remote"
    calls: list[Any] = []

    class Api:
        def __init__(self, token: str | None = None) -> None:
            calls.append(("token", token))

        def create_repo(self, repo_id: str, **options: Any) -> None:
            calls.append((repo_id, options))

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> Any:
            shutil.copytree(folder_path, remote)
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def download(repo_id: str, name: str, **options: Any) -> str:
        return str(remote / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert shift.push_to_hub("me/shift", private=True, token="t").endswith("me/shift/commit/1")
    assert calls == [("token", "t"), ("me/shift", {"private": True, "exist_ok": True})]
    assert sorted(os.listdir(remote)) == ["README.md", FILE_NAME]
    assert torch.equal(ShiftVectors.from_pretrained("me/shift").vectors, shift.vectors)
    assert torch.equal(ShiftVectors.from_pretrained(remote).vectors, shift.vectors)
    assert torch.equal(ShiftVectors.from_pretrained(remote / FILE_NAME).vectors, shift.vectors)


def test_the_hub_out_of_reach_is_one_clear_line(shift: ShiftVectors) -> None:
    for action in (
        lambda: shift.push_to_hub("me/shift"),
        lambda: ShiftVectors.from_pretrained("me/no-such-shift"),
    ):
        with pytest.raises(ArtifactError, match=r"me/(no-such-)?shift") as caught:
            action()
        assert "\n" not in str(caught.value)


def test_card_says_what_it_is_and_how_to_use_it(shift: ShiftVectors) -> None:
    text = card(shift.provenance, shift.recommended, repo_id="me/shift")
    header = text.split("---")[1]
    assert "library_name: cmrm" in header
    assert 'ShiftVectors.from_pretrained("me/shift")' in text
    for said in ("alpha 0.2, telescoped", "6, set hash", "blank", "pca", "3 x 32", "refused"):
        assert said in text


def test_card_says_what_was_fitted_with_benign_anchors(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.new("RGB", (16, 16), "red")
    kinds = [
        [Sample(f"{about}{k}", f"{about} {k}" + "!" * (k % 3), image) for k in range(11)]
        for about in ("Tell me about number", "Who painted wall")
    ]
    gated = Steering(schedule="sequential", gate=True)
    shift = estimate_shift(vlm, *kinds, recommended=gated)
    text = card(shift.provenance, shift.recommended, records=shift.records)
    assert shift.gate is not None
    for said in (
        "| benign anchors | 11, set hash",
        "| fill | the artifact holds the refusal direction",
        f"| harm gate | reads decoder layer {shift.gate.layers[0]}, AUC ",
        "| refusal coordinate that the corrupted image takes | ",
        "| sequential vectors | decoder layers ",
        "gate: True",
    ):
        assert said in text
    rows = text[text.index("| | |") :].split("\n\n")[0].splitlines()
    assert all(row.startswith("|") and row.endswith("|") for row in rows)
    assert "| recommended | nothing: alpha 0" in card(shift.provenance, Steering(0.0))
    plain = card(replace(shift.provenance, n_benign=0, sequential_layers=()), Steering())
    assert not any(word in plain for word in ("harm gate", "| fill", "| sequential"))
    uploaded: list[str] = []

    def push(repo_id: str, save: Any, text: str, **options: Any) -> str:
        uploaded.append(text)
        return ""

    monkeypatch.setattr("cmrm.shift.hub.push", push)
    shift.push_to_hub("me/shift")
    assert "harm gate" in uploaded[0]
