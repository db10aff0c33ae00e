"""The contract, on a tiny random model of every covered family, in both precisions; and that the
contract can fail."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cmrm.checks.clauses
import cmrm.checks.steered
import cmrm.model.layers
import cmrm.model.vlm
from cmrm import Sample, Steering, estimate_shift, generate, load_vlm, steer, wrap_vlm
from cmrm.checks.run import Outcome, run_checks
from cmrm.errors import ModelError
from cmrm.model.encode import encode
from cmrm.model.families import FAMILIES as COVERED
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request, build_request, build_requests
from cmrm.shift.capture import capture, capture_inputs
from families import FAMILIES

MIXING = "a text-only prompt is the same beside one with image"
MIXES_BADLY = {"mllama", "paligemma"}
TWO = "two conversations in turn are steered as each is alone"
KEEPS_OFFSETS = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"}
"""These models keep the rotary offset of the last image themselves: unsteered, two caches in turn
mix them too."""


def built(key: str, dtype: torch.dtype = torch.float32) -> VLM:
    model, processor = FAMILIES[key]()
    if dtype != torch.float32:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return wrap_vlm(model, processor, model_id=key)


def test_every_covered_family_has_a_model_and_every_model_a_family() -> None:
    assert {f.key for f in COVERED} == set(FAMILIES)
    assert len(COVERED) >= 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", COVERED, ids=lambda f: f.key)
def test_contract(family: Any, dtype: torch.dtype) -> None:
    vlm = built(family.key, dtype)
    assert type(vlm.model).__name__ == family.architecture
    findings = run_checks(vlm)
    wrong = [(f.name, f.detail) for f in findings if f.outcome is Outcome.FAIL]
    assert not wrong
    skipped = {f.name for f in findings if f.outcome is Outcome.SKIP}
    expected = {MIXING} if family.key in MIXES_BADLY else set()
    assert skipped == expected | ({TWO} if family.key in KEEPS_OFFSETS else set())


@pytest.mark.parametrize("family", COVERED, ids=lambda f: f.key)
def test_contract_with_torchao_int8(family: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, processor = FAMILIES[family.key]()
    decoder = model.get_decoder()
    quantization.quantize_(decoder, quantization.Int8WeightOnlyConfig())
    assert any("Int8" in type(p).__name__ for p in decoder.parameters()), "nothing was quantised"
    wrong = [
        (f.name, f.detail)
        for f in run_checks(wrap_vlm(model, processor))
        if f.outcome is Outcome.FAIL
    ]
    assert not wrong


def offload_map(vlm: VLM) -> dict[str, str]:
    """All decoder layers but the first on disk, everything else on the CPU."""
    names = {id(module): name for name, module in vlm.model.named_modules()}
    away = {names[id(layer)] for layer in vlm.layers[1:]}
    found: dict[str, str] = {}

    def visit(prefix: str, module: nn.Module) -> None:
        if prefix in away:
            found[prefix] = "disk"
        elif prefix and not any(name.startswith(f"{prefix}.") for name in away):
            found[prefix] = "cpu"
        else:
            inside = f"{prefix}." if prefix else ""
            for name, _ in [
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ]:
                found[inside + name] = "cpu"
            for name, child in module.named_children():
                visit(inside + name, child)

    visit("", vlm.model)
    return found


@pytest.mark.parametrize("family", COVERED, ids=lambda f: f.key)
def test_contract_when_loaded_with_layers_on_disk(family: Any, tmp_path: Path) -> None:
    vlm = built(family.key)
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    loaded = load_vlm(tmp_path, device_map=offload_map(vlm))
    assert any(p.device.type == "meta" for p in loaded.model.parameters()), "nothing was offloaded"
    wrong = [(f.name, f.detail) for f in run_checks(loaded) if f.outcome is Outcome.FAIL]
    assert not wrong
    request = Request("what is it")
    states = capture_inputs(vlm, encode(vlm, [request]))
    assert torch.equal(states, capture_inputs(loaded, encode(loaded, [request])))


def test_contract_with_everything_offloaded() -> None:
    from accelerate import cpu_offload

    vlm = built("llava")
    cpu_offload(vlm.model, execution_device=torch.device("cpu"))
    assert vlm.device == torch.device("cpu")
    wrong = [(f.name, f.detail) for f in run_checks(vlm) if f.outcome is Outcome.FAIL]
    assert not wrong


def outcome_of(name: str, vlm: VLM) -> Outcome:
    return next(f.outcome for f in run_checks(vlm) if f.name == name)


def test_a_gate_that_lets_all_rows_through_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = built("llava")

    @contextmanager
    def ungated(vlm: VLM, vectors: Any, steering: Any = None, **more: Any) -> Iterator[None]:
        with steer(vlm, vectors, steering, has_image=[True] * 3):
            yield

    monkeypatch.setattr(cmrm.checks.steered, "steer", ungated)
    assert (
        outcome_of("rows without image are untouched in a mixed, padded batch", vlm) is Outcome.FAIL
    )


def test_a_flipped_sign_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = built("llava")

    @contextmanager
    def flipped(
        vlm: VLM, vectors: torch.Tensor, steering: Any = None, **more: Any
    ) -> Iterator[None]:
        with steer(vlm, -vectors, steering, **more):
            yield

    monkeypatch.setattr(cmrm.checks.steered, "steer", flipped)
    assert (
        outcome_of("what is added is alpha v, at the chosen layer and position", vlm)
        is Outcome.FAIL
    )


def test_layers_in_the_wrong_order_are_found() -> None:
    vlm = built("llava")
    object.__setattr__(vlm, "layers", tuple(reversed(vlm.layers)))
    findings = {f.name: f.outcome for f in run_checks(vlm)}
    assert findings["capture equals a plain forward"] is Outcome.PASS, "it reads the same blocks"
    object.__setattr__(vlm, "layers", vlm.layers[:2])
    assert outcome_of("decoder layers are found and counted", vlm) is Outcome.FAIL


def test_a_processor_that_drops_the_image_is_found() -> None:
    vlm = built("llava")
    vlm.processor.chat_template = vlm.processor.chat_template.replace("<image>", "")
    assert (
        outcome_of("image tokens stand exactly where a condition has an image", vlm) is Outcome.FAIL
    )


def test_cross_attention_layers_carry_the_state_on_in_text() -> None:
    vlm = built("mllama")
    assert vlm.skippable == {1, 3}
    states = capture_inputs(vlm, encode(vlm, [Request("what is it")]))[0]
    assert torch.equal(states[1], states[0])
    assert torch.equal(states[3], states[2])
    assert not torch.equal(states[2], states[1])
    with steer(vlm, torch.randn(vlm.n_layers, vlm.hidden_size)):
        vlm.model(**encode(vlm, [Request("text alone may be run under steering")]))


def test_a_generated_image_token_does_not_open_the_gate() -> None:
    vlm = built("llava")
    inputs = encode(vlm, [Request("what is it")])
    vlm.model.lm_head.weight.data[vlm.image_token_id] = (
        100 * vlm.model.lm_head.weight.data.sign().float().mean(0)
    )
    plain = vlm.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with steer(vlm, torch.randn(vlm.n_layers, vlm.hidden_size), Steering(positions="all")):
        steered = vlm.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(plain, steered)


class _Stranger(nn.Module):
    def __init__(self, lists: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Linear(2, 2) for _ in range(3)) for _ in range(lists)
        )

    class config:
        num_hidden_layers = 3
        hidden_size = 2

        @classmethod
        def get_text_config(cls) -> Any:
            return cls


def test_unknown_structure_says_what_was_looked_for() -> None:
    with pytest.raises(
        ModelError, match=r"looked for one list of 3 .*attention blocks.* found none"
    ):
        cmrm.model.layers.find_decoder_layers(_Stranger(1))


def test_out_of_memory_halves_the_batch_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = built("llava")
    samples = [Sample(f"s{k}", f"query {k}") for k in range(7)]
    requests = list(build_requests(samples, "query"))
    expected = capture(vlm, requests, batch_size=1)
    forward, seen = vlm.model.forward, []

    def small_memory(*args: Any, **kwargs: Any) -> Any:
        rows = kwargs["input_ids"].shape[0]
        seen.append(rows)
        if rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(vlm.model, "forward", small_memory)
    with pytest.warns(UserWarning, match="out of memory") as caught:
        states = capture(vlm, requests, batch_size=7)
    assert len([w for w in caught if "out of memory" in str(w.message)]) == 1
    assert seen == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert torch.allclose(states, expected, atol=1e-4)
    with pytest.warns(UserWarning, match="out of memory"):
        replies = generate(vlm, samples, condition="query", max_new_tokens=2, batch_size=4)
    assert [r.sample_id for r in replies] == [s.id for s in samples]


def test_memory_that_one_prompt_exhausts_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = built("llava")

    def none_left(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(vlm.model, "forward", none_left)
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="out of memory"):
        capture(
            vlm, list(build_requests([Sample("a", "q"), Sample("b", "q")], "query")), batch_size=2
        )


def test_every_corruption_estimates_a_shift(vlm: VLM, anchors: list[Sample]) -> None:
    found = {}
    for corruption in cmrm.prompts.conditions.CORRUPTED:
        shift = estimate_shift(vlm, anchors, corruption=corruption)
        assert shift.provenance.corruption == corruption.value
        found[corruption] = shift.vectors
    assert len(found) == 8
    assert build_request(anchors[0], "grey").images[0].getcolors() == [(320, (128, 128, 128))]


def test_a_registered_override_is_taken_where_structure_misleads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cmrm.model.layers, "LAYER_OVERRIDES", {})
    model, processor = FAMILIES["llava"]()
    decoder = model.model.language_model
    decoder.rest = nn.ModuleList(decoder.layers)
    with pytest.raises(ModelError, match="looked for one list of 3"):
        wrap_vlm(model, processor)
    cmrm.model.layers.register_layers(
        "LlavaForConditionalGeneration", lambda m: m.model.language_model.layers
    )
    vlm = wrap_vlm(model, processor)
    assert vlm.layers == tuple(decoder.layers)


def test_the_contract_is_there_without_asserts() -> None:
    script = (
        "import cmrm.checks.clauses as c\ntry:\n c.require(False, 'x')\n"
        "except c.Broken:\n print('broken')"
    )
    done = subprocess.run(
        [sys.executable, "-O", "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "broken"
