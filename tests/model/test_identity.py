"""What identifies a model: which changes refuse an artifact, and which do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from cmrm import VLM, Sample, ShiftVectors, estimate_shift, load_vlm, wrap_vlm
from cmrm.errors import ArtifactError
from cmrm.model.identity import identity_of, public_name
from cmrm.model.weights import checksum
from tiny import tiny_model, tiny_processor

IMAGE = Image.new("RGB", (16, 16), "red")
ANCHORS = [Sample(f"a{k}", f"Tell me about paint {k}", IMAGE) for k in range(4)]
LORA = {"target_modules": ["q_proj", "v_proj"], "r": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(place)
    tiny_processor().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def shift(folder: Path) -> ShiftVectors:
    return estimate_shift(load_vlm(folder), ANCHORS)


def write(vlm: VLM, part: str, change: Callable[[torch.Tensor], Any]) -> Any:
    weight = next(p for name, p in vlm.model.named_parameters() if part in name and p.dim() > 1)
    change(weight.data)


HARMLESS: dict[str, Callable[[VLM], Any]] = {
    "use_cache": lambda v: setattr(v.model.config.text_config, "use_cache", False),
    "pad token": lambda v: setattr(v.model.config, "pad_token_id", 2),
    "no bos token": lambda v: setattr(v.model.config.text_config, "bos_token_id", None),
    "hidden states": lambda v: setattr(v.model.config, "output_hidden_states", True),
    "a new default": lambda v: setattr(v.model.config, "a_field_of_tomorrow", 3),
    "attention": lambda v: v.model.set_attn_implementation("eager"),
    "gradient checkpointing": lambda v: v.model.gradient_checkpointing_enable(),
    "bfloat16": lambda v: v.model.to(torch.bfloat16),
    "float16": lambda v: v.model.to(torch.float16),
    "another place": lambda v: setattr(v.model.config, "_name_or_path", "/elsewhere"),
}

OTHER: dict[str, Callable[[VLM], Any]] = {
    "one value of one weight": lambda v: write(v, "down_proj", lambda w: w[3, 5].add_(0.01)),
    "one value of the connector": lambda v: write(
        v, "multi_modal_projector", lambda w: w[1, 1].add_(0.01)
    ),
    "the vision tower": lambda v: write(v, "vision_tower", lambda w: w.mul_(-1)),
    "weights in another dtype": lambda v: (
        write(v, "q_proj", lambda w: w.mul_(1.1)),
        v.model.to(torch.bfloat16),
    ),
    "rope": lambda v: v.model.config.text_config.rope_parameters.update(rope_theta=500.0),
    "the norm's epsilon": lambda v: setattr(v.model.config.text_config, "rms_norm_eps", 1e-3),
    "chat template": lambda v: setattr(
        v.processor, "chat_template", v.processor.chat_template + "\n"
    ),
    "image size": lambda v: setattr(v.processor.image_processor, "image_mean", [0.1, 0.2, 0.3]),
    "image tokens": lambda v: setattr(v.processor, "patch_size", 16),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_changes_keep_the_artifact(folder: Path, shift: ShiftVectors, name: str) -> None:
    vlm = load_vlm(folder)
    HARMLESS[name](vlm)
    shift.check(vlm)


@pytest.mark.parametrize("name", OTHER)
def test_other_models_are_refused_and_the_difference_is_named(
    folder: Path, shift: ShiftVectors, name: str
) -> None:
    vlm = load_vlm(folder)
    shift.check(vlm)
    OTHER[name](vlm)
    with pytest.raises(ArtifactError, match=r"weights|config|processor|template") as caught:
        shift.check(vlm)
    assert "\n" not in str(caught.value)


def test_made_in_memory_used_from_a_folder(folder: Path) -> None:
    made = estimate_shift(wrap_vlm(tiny_model(), tiny_processor(), model_id="tiny"), ANCHORS)
    made.check(load_vlm(folder))
    made.check(load_vlm(folder, dtype="bfloat16"))


def test_made_in_bfloat16_used_in_float32(folder: Path) -> None:
    estimate_shift(load_vlm(folder, dtype="bfloat16"), ANCHORS).check(load_vlm(folder))


def test_a_quantised_load_of_the_same_weights_is_taken(folder: Path, shift: ShiftVectors) -> None:
    quantization = pytest.importorskip(
        "torchao.quantization", reason="torchao quantises the weights"
    )
    vlm = load_vlm(folder)
    quantization.quantize_(vlm.model.get_decoder(), quantization.Int8WeightOnlyConfig())
    shift.check(vlm)
    norm = next(p for name, p in vlm.model.named_parameters() if "input_layernorm" in name)
    norm.data.mul_(2)
    with pytest.raises(ArtifactError, match="other weights"):
        shift.check(vlm)


def test_adapters_count_while_they_act(folder: Path, shift: ShiftVectors) -> None:
    vlm = load_vlm(folder)
    peft = get_peft_model(vlm.model, LoraConfig(**LORA)).eval()
    wrapped = wrap_vlm(peft, vlm.processor)
    shift.check(wrapped)
    for name, weight in peft.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    with pytest.raises(ArtifactError, match="other weights"):
        shift.check(wrapped)
    with peft.disable_adapter():
        shift.check(wrapped)
    own = estimate_shift(wrapped, ANCHORS)
    own.check(wrapped)
    with peft.disable_adapter(), pytest.raises(ArtifactError, match="other weights"):
        own.check(wrapped)
    peft.merge_adapter()
    with pytest.raises(ArtifactError, match="other weights"):
        shift.check(wrapped)


def test_switching_adapters_changes_the_identity(folder: Path) -> None:
    vlm = load_vlm(folder)
    peft = get_peft_model(vlm.model, LoraConfig(**LORA, init_lora_weights=False)).eval()
    peft.add_adapter("second", LoraConfig(**LORA, init_lora_weights=False))
    wrapped = wrap_vlm(peft.eval(), vlm.processor)
    first = identity_of(wrapped).key
    peft.set_adapter("second")
    second = identity_of(wrapped).key
    peft.set_adapter("default")
    assert identity_of(wrapped).key == first != second


def test_the_key_knows_the_dtype(folder: Path) -> None:
    assert identity_of(load_vlm(folder)).key == identity_of(load_vlm(folder)).key
    assert identity_of(load_vlm(folder)).key != identity_of(load_vlm(folder, dtype="bfloat16")).key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_checksum_sees_every_value_and_its_place(dtype: torch.dtype) -> None:
    values = torch.randn(3000, 500, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = checksum(values)
    assert checksum(values.clone()) == whole
    assert checksum(values.reshape(500, 3000)) == whole
    for place in (0, 777_777, 1_499_999):
        other = values.clone().reshape(-1)
        other[place] += 1
        assert checksum(other) != whole
    assert checksum(values.flip(0)) != whole
    assert checksum(values[:1]) != checksum(values[:2])


@pytest.mark.parametrize(
    ("model_id", "shown"),
    [
        ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"),
        ("/home/me/models/llava", "llava"),
        ("./models/llava/", "llava"),
        ("C:\\Users\\me\\llava", "llava"),
        ("models/deep/llava", "llava"),
        ("~/llava", "llava"),
        ("demo", "demo"),
        ("LlavaForConditionalGeneration", "LlavaForConditionalGeneration"),
    ],
)
def test_no_local_path_is_shown(model_id: str, shown: str) -> None:
    assert public_name(model_id) == shown
