"""Control vectors and folded text models in llama.cpp itself, beside transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="control vectors need the extra `gguf`")
pytest.importorskip("xllamacpp", reason="llama.cpp comes with the package xllamacpp")

from importlib.metadata import version

from transformers import LlamaConfig, LlamaForCausalLM

from cmrm.engines.fold import fold
from cmrm.engines.gguf import write_control_vector
from engines.llama_cpp import VERSION, LlamaCpp, write_llama

pytestmark = pytest.mark.skipif(
    version("xllamacpp") != VERSION, reason=f"its binary interface is that of xllamacpp {VERSION}"
)

LAYERS, WIDTH, VOCABULARY = 4, 64, 96
IDS = (3, 17, 52, 8, 90, 33, 61)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCABULARY, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def additions() -> torch.Tensor:
    return 0.8 * torch.randn(LAYERS, WIDTH, generator=torch.Generator().manual_seed(1))


def steered(model: Any, additions: torch.Tensor | None = None) -> np.ndarray:
    """Logits behind the last token, with rows added behind the decoder blocks."""
    handles = [
        layer.register_forward_hook(lambda module, inputs, out, row=row: out + row)
        for layer, row in zip(model.model.layers, () if additions is None else additions)  # noqa: B905
    ]
    with torch.inference_mode():
        logits = model(torch.tensor([IDS])).logits[0, -1].numpy()
    for handle in handles:
        handle.remove()
    return logits


def test_a_control_vector_is_the_addition_above_layer_0(
    model: LlamaForCausalLM, additions: torch.Tensor, tmp_path: Path
) -> None:
    write_llama(model, tmp_path / "m.gguf")
    write_control_vector(tmp_path / "v.gguf", additions, "llama", record={"alpha": 1.0})
    engine = LlamaCpp(tmp_path / "m.gguf")
    width, values = engine.control_vector(tmp_path / "v.gguf")
    assert (width, values.size) == (WIDTH, WIDTH * (LAYERS - 1))
    assert np.array_equal(values.reshape(-1, WIDTH), additions[1:].numpy())
    plain = engine.logits(IDS, VOCABULARY)
    assert np.abs(plain - steered(model)).max() < 2e-2
    moved = engine.logits(IDS, VOCABULARY, (width, values), LAYERS)
    above = additions.clone()
    above[0] = 0
    assert np.abs(moved - steered(model, above)).max() < 2e-2
    assert np.abs(moved - plain).max() > 0.5
    assert np.abs(moved - steered(model, additions)).max() > 0.1, "layer 0 is left out"


def test_a_zero_control_vector_changes_nothing(model: LlamaForCausalLM, tmp_path: Path) -> None:
    write_llama(model, tmp_path / "m.gguf")
    engine = LlamaCpp(tmp_path / "m.gguf")
    zero = (WIDTH, np.zeros(WIDTH * (LAYERS - 1), dtype=np.float32))
    assert np.array_equal(
        engine.logits(IDS, VOCABULARY, zero, LAYERS), engine.logits(IDS, VOCABULARY)
    )


def test_llama_cpp_refuses_what_is_no_control_vector(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    write_llama(model, tmp_path / "m.gguf")
    assert LlamaCpp(tmp_path / "m.gguf").control_vector(tmp_path / "none.gguf")[0] == -1


def test_a_folded_text_model_steers_layer_0_too(
    model: LlamaForCausalLM, additions: torch.Tensor, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "model")
    fold(tmp_path / "model", additions, tmp_path / "folded", record={})
    folded = LlamaForCausalLM.from_pretrained(tmp_path / "folded")
    assert np.abs(steered(folded) - steered(model, additions)).max() < 1e-4
    write_llama(folded, tmp_path / "f.gguf")
    logits = LlamaCpp(tmp_path / "f.gguf").logits(IDS, VOCABULARY)
    assert np.abs(logits - steered(model, additions)).max() < 2e-2
