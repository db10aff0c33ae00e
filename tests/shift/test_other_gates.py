"""CAST's and HiddenDetect's gates against independent computations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cmrm import Sample, Steering, estimate_shift, wrap_vlm
from cmrm.errors import InputError, ModelError
from cmrm.model.vlm import VLM
from cmrm.shift.harm_gate import at_false_alarms
from cmrm.shift.other_gates import (
    REFUSAL_WORDS,
    condition_vectors,
    fit_other_gate,
    norm_gain,
    refusal_vocabulary,
    trapezoid,
)
from families import FAMILIES
from tiny import tiny_model, tiny_processor

LAYERS, WIDTH = 6, 8


def two_kinds(n: int = 40, apart: float = 4.0) -> tuple[torch.Tensor, torch.Tensor]:
    """States that differ along the first axis, from layer 2 on."""
    generator = torch.Generator().manual_seed(3)
    harmful = torch.randn(n, LAYERS, WIDTH, generator=generator)
    benign = torch.randn(n, LAYERS, WIDTH, generator=generator)
    harmful[:, 2:, 0] += apart
    return harmful, benign


def test_the_condition_vector_is_the_first_principal_direction() -> None:
    harmful, benign = two_kinds()
    vectors = condition_vectors(harmful, benign)
    centre = (harmful.mean(0) + benign.mean(0)) / 2
    both = (torch.cat([harmful, benign]) - centre)[:, 3].double().numpy()
    expected = np.linalg.eigh(both.T @ both).eigenvectors[:, -1]
    assert abs(expected @ vectors[3].double().numpy()) == pytest.approx(1.0, abs=1e-5)
    assert float((vectors[3] * (harmful - benign).mean(0)[3]).sum()) > 0, "towards the harmful"


def test_the_cosine_gate_separates_at_the_wanted_share_of_false_alarms() -> None:
    harmful, benign = two_kinds(200)
    gate, record = fit_other_gate("cosine", harmful, benign, false_alarms=0.1)
    assert gate.layers == (record.layer,)
    assert 2 <= record.layer < LAYERS - 1
    assert record.auc[record.layer] > 0.75 > record.auc[0]
    assert record.false_alarms == pytest.approx(0.1, abs=0.01)
    looser, at_a_fifth = at_false_alarms(gate, record, 0.2)
    assert looser.threshold < gate.threshold
    assert at_a_fifth.false_alarms == pytest.approx(0.2, abs=0.01)
    opens = [
        gate.opens(states[:, list(gate.layers)]).double().mean() for states in (harmful, benign)
    ]
    assert opens[0] > 0.5
    assert opens[1] < 0.15


def test_a_layer_where_harmful_requests_score_lower_is_read_from_the_other_side() -> None:
    harmful, benign = two_kinds(100)
    gate, record = fit_other_gate("cosine", benign, harmful)
    assert gate.weights == (-1.0,)
    assert record.auc[record.layer] > 0.75
    assert float(gate.opens(benign[:, list(gate.layers)]).double().mean()) > 0.5


def test_no_gate_stands_above_the_highest_layer() -> None:
    harmful, benign = two_kinds()
    gate, _ = fit_other_gate("cosine", harmful, benign, highest=1)
    assert gate.layers[-1] <= 1
    with pytest.raises(InputError, match=r"one of 0\.\.4; it was given 5"):
        fit_other_gate("cosine", harmful, benign, highest=5)
    with pytest.raises(InputError, match="at least 10 of each"):
        fit_other_gate("cosine", harmful[:9], benign)
    with pytest.raises(InputError, match="needs the model's vocabulary"):
        fit_other_gate("vocabulary", harmful, benign)
    with pytest.raises(InputError, match="the gate's kind is 'linear'"):
        fit_other_gate("linear", harmful, benign)  # type: ignore[arg-type]


def test_the_trapezoid_rule() -> None:
    values = np.array([0.3, -1.0, 2.0, 0.7])
    assert float(np.dot(trapezoid(4), values)) == pytest.approx(np.trapezoid(values))
    assert trapezoid(1) == (1.0,)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "internvl", "mllama"])
def test_the_vocabulary_score_is_the_cosine_of_the_logit_lens(name: str) -> None:
    vlm = wrap_vlm(*FAMILIES[name](), model_id=name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in final_norm(vlm).parameters():
            parameter.copy_(parameter + 0.3 * torch.randn(parameter.shape, generator=generator))
    n, depth = 12, 8
    states = 3 * torch.randn(2 * n, depth, vlm.hidden_size, generator=generator)
    tokens = {vlm.tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in REFUSAL_WORDS}
    head = vlm.model.get_output_embeddings()
    with torch.no_grad():
        logits = head(final_norm(vlm)(states)).double().numpy()
    wanted = np.zeros(logits.shape[-1])
    wanted[list(tokens)] = 1.0
    cosines = logits @ wanted / np.linalg.norm(logits, axis=-1) / np.linalg.norm(wanted)

    vocabulary = refusal_vocabulary(vlm)
    gate, record = fit_other_gate("vocabulary", states[:n], states[n:], vocabulary=vocabulary)
    assert gate.layers == tuple(range(4, record.layer + 1))
    read = cosines[:, list(gate.layers)]
    expected = np.trapezoid(read, axis=1) if len(gate.layers) > 1 else read[:, 0]
    scores = gate.scores(states[:, list(gate.layers)])
    assert np.allclose(scores.numpy(), expected, atol=2e-4)
    assert gate.threshold == pytest.approx(np.quantile(expected[n:], 0.95), abs=1e-3)


def final_norm(vlm: VLM) -> Any:
    decoder = next(
        module
        for module in vlm.model.modules()
        if any(isinstance(c, nn.ModuleList) and tuple(c) == vlm.layers for c in module.children())
    )
    return next(c for n, c in decoder.named_children() if n in ("norm", "final_layernorm"))


def test_another_norm_is_refused() -> None:
    model = tiny_model()
    decoder = model.model.language_model
    decoder.norm = nn.LayerNorm(32).eval()
    vlm = wrap_vlm(model, tiny_processor(), model_id="tiny")
    with pytest.raises(ModelError, match="LayerNorm is no RMSNorm"):
        norm_gain(vlm)


@pytest.mark.parametrize("kind", ["cosine", "vocabulary"])
def test_an_artifact_holds_the_gate_and_steers_above_it(vlm: VLM, kind: Any) -> None:
    from PIL import Image

    def samples(word: str) -> list[Sample]:
        image = Image.new("RGB", (16, 16), "red")
        return [Sample(f"{word}{k}", f"{word} number {k}", image) for k in range(10)]

    shift = estimate_shift(
        vlm, samples("paint"), samples("cook"), gate_kind=kind,
        recommended=Steering(schedule="sequential", gate=True),
    )  # fmt: skip
    assert shift.gate is not None
    assert shift.gate.kind == kind
    assert shift.provenance.sequential_layers[0] == shift.gate.layers[-1] + 1
    assert shift.records["gate"]["layer"] == shift.gate.layers[-1]
    with pytest.raises(InputError, match="gate_kind is 'linear'"):
        estimate_shift(vlm, samples("paint"), samples("cook"), gate_kind="linear")  # type: ignore[arg-type]
