"""Models as others hold them: wrapped, in training mode, with a block at two places, with
adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn

from cmrm import Sample, Steering, estimate_shift, steer, wrap_vlm
from cmrm.errors import ModelError
from cmrm.model.encode import encode
from cmrm.model.vlm import load_vlm
from cmrm.prompts.conditions import Request
from tiny import tiny_model, tiny_processor

IMAGE = Image.new("RGB", (16, 16), "red")
ANCHORS = [Sample(f"a{k}", f"Tell me about paint {k}", IMAGE) for k in range(4)]
LAST = Steering(1.0, "per_layer", "last")
LORA = {"target_modules": ["q_proj", "v_proj"], "r": 4}


def wrapped(kind: str) -> Any:
    model = tiny_model()
    if kind == "peft":
        return get_peft_model(model, LoraConfig(**LORA)).eval()
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("kind", ["peft", "compile"])
def test_a_wrapper_is_steered_as_the_model_itself(kind: str) -> None:
    bare = wrap_vlm(tiny_model(), tiny_processor(), model_id="tiny")
    inputs = encode(bare, [Request("Describe this.", (IMAGE,))])
    vectors = torch.randn(bare.n_layers, bare.hidden_size)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with torch.no_grad(), steer(bare, vectors, LAST):
        logits = bare.model(**inputs).logits
        tokens = bare.model.generate(**inputs, **options)
    shift = estimate_shift(bare, ANCHORS)
    wrapper = wrapped(kind)
    vlm = wrap_vlm(wrapper, tiny_processor(), model_id="tiny")
    shift.check(vlm)
    with torch.no_grad(), steer(vlm, vectors, LAST):
        assert torch.allclose(wrapper(**inputs).logits, logits, atol=1e-4)
        assert torch.equal(wrapper.generate(**inputs, **options), tokens)
    assert torch.allclose(estimate_shift(vlm, ANCHORS).vectors, shift.vectors, atol=1e-4)


def test_prompt_learning_is_refused() -> None:
    from peft import PromptTuningConfig

    with pytest.raises(ModelError, match="changes the prompt outside"):
        model = get_peft_model(
            tiny_model(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        )
        wrap_vlm(model, tiny_processor())


def test_data_parallel_is_refused() -> None:
    with pytest.raises(ModelError, match="DataParallel"):
        wrap_vlm(nn.DataParallel(tiny_model()), tiny_processor())


def test_training_mode_is_refused() -> None:
    model = tiny_model()
    model.train()
    with pytest.raises(ModelError, match="training mode"):
        wrap_vlm(model, tiny_processor())


def test_dropout_left_in_training_mode_is_refused_at_every_use() -> None:
    model = get_peft_model(tiny_model(), LoraConfig(**LORA, lora_dropout=0.5))
    model.get_base_model().eval()
    vlm = wrap_vlm(model, tiny_processor(), model_id="tiny")
    inputs = encode(vlm, [Request("Describe this.", (IMAGE,))])
    dropout = next(m for m in model.modules() if isinstance(m, nn.Dropout) and m.p == 0.5)
    dropout.train()
    from cmrm import generate
    from cmrm.shift.capture import capture_inputs

    for use in (
        lambda: wrap_vlm(model, tiny_processor()),
        lambda: capture_inputs(vlm, inputs),
        lambda: estimate_shift(vlm, ANCHORS),
        lambda: steer(vlm, torch.zeros(vlm.n_layers, vlm.hidden_size)),
        lambda: generate(vlm, ANCHORS[:1], max_new_tokens=1),
    ):
        with pytest.raises(ModelError, match=r"model\.eval\(\)"):
            use()


def test_a_block_at_two_places_is_refused() -> None:
    model = tiny_model()
    layers = model.model.language_model.layers
    layers[2] = layers[1]
    with pytest.raises(ModelError, match="decoder layers 1 and 2 are the same module"):
        wrap_vlm(model, tiny_processor())


def test_a_literal_placeholder_is_one_clear_line_that_names_the_sample() -> None:
    from cmrm import generate
    from cmrm.errors import InputError

    vlm = wrap_vlm(tiny_model(), tiny_processor())
    for sample in (
        Sample("row 7", "what does <image> do?"),
        Sample("row 7", "<image>\nwhat is it?", IMAGE),
    ):
        condition = "query" if sample.image is None else "original"
        with pytest.raises(InputError, match=r"sample 'row 7': its text holds '<image>'"):
            generate(vlm, [sample], condition=condition, max_new_tokens=1)


def test_encoding_leaves_the_tokenizer_as_it_is() -> None:
    vlm = wrap_vlm(tiny_model(), tiny_processor())
    vlm.tokenizer.padding_side = "right"
    inputs = encode(vlm, [Request("a"), Request("a longer one")])
    assert inputs["attention_mask"][0, 0] == 0, "left padding"
    assert vlm.tokenizer.padding_side == "right"


@pytest.mark.parametrize(
    "name", ["generation_config.use_cache", "config.text_config.use_cache", "dict"]
)
def test_settings_that_a_checkpoint_brings_change_no_reply(name: str) -> None:
    from cmrm import generate

    vlm = wrap_vlm(tiny_model(), tiny_processor(), model_id="tiny")
    samples = [Sample("s", "Describe this.", IMAGE)]
    shift = estimate_shift(vlm, ANCHORS)
    plain = generate(vlm, samples, max_new_tokens=6)
    steered = generate(vlm, samples, shift=shift, max_new_tokens=6)
    if name == "dict":
        vlm.model.generation_config.return_dict_in_generate = True
    elif name.startswith("generation"):
        vlm.model.generation_config.use_cache = False
    else:
        vlm.model.config.text_config.use_cache = False
    assert generate(vlm, samples, max_new_tokens=6) == plain
    assert generate(vlm, samples, shift=shift, max_new_tokens=6) == steered


def test_a_registered_model_takes_no_revision() -> None:
    with pytest.raises(ModelError, match="registered model"):
        load_vlm("demo", revision="main")
