"""Random conversations in every way of decoding, against one slow reference that recomputes the
whole prompt."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cmrm import Steering, steer, wrap_vlm
from cmrm.model.compat import cache_of, with_cache
from cmrm.model.encode import encode
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request
from steering.reference import Script, Turn, recomputed, telescoped
from tiny import tiny_model, tiny_processor

POSITIONS = ("last", "all", "after_image", "generated", "last_prompt")
IMAGES = tuple(Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
EXAMPLES = int(os.environ.get("CMRM_PROPERTY_EXAMPLES", "25"))
MANY = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

words = st.text(alphabet="abc de", min_size=1, max_size=24).filter(str.strip)
requests = st.builds(
    lambda text, images, last: Request(text, images, image_last=last),
    words,
    st.sampled_from([(), IMAGES[:1], IMAGES]),
    st.booleans(),
)


@pytest.fixture(scope="module")
def model() -> VLM:
    return wrap_vlm(tiny_model(), tiny_processor(), model_id="tiny")


@pytest.fixture(scope="module")
def vectors(model: VLM) -> torch.Tensor:
    return 2 * torch.randn(
        model.n_layers, model.hidden_size, generator=torch.Generator().manual_seed(3)
    )


def script_of(model: VLM, inputs: dict[str, torch.Tensor]) -> Script:
    """What the test itself knows of a prompt: by plain loops over its tokens."""
    gate, last_image, real = [], [], []
    for ids, mask in zip(
        inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True
    ):
        places = [k for k, token in enumerate(ids) if token == model.image_token_id]
        gate.append(bool(places))
        last_image.append(places[-1] if places else -1)
        real.append([bool(value) for value in mask])
    return Script(gate, [Turn(0, inputs["input_ids"].shape[1])], last_image, real)


def generated(model: VLM, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    decoding = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        out: torch.Tensor = model.model.generate(**inputs, **{**decoding, **options})
    return out


def expected_of(
    model: VLM,
    inputs: dict[str, torch.Tensor],
    vectors: torch.Tensor,
    alpha: float,
    positions: str,
    **options: Any,
) -> torch.Tensor:
    with recomputed(model, telescoped(vectors, alpha), script_of(model, inputs), positions):
        return generated(model, inputs, use_cache=False, **options)


WAYS: dict[str, dict[str, Any]] = {
    "cached": {},
    "uncached": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "several returned": {"num_beams": 4, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "temperature": 2.0, "num_return_sequences": 2},
}


@MANY
@given(
    batch=st.lists(requests, min_size=1, max_size=3),
    positions=st.sampled_from(POSITIONS),
    way=st.sampled_from(sorted(WAYS)),
    alpha=st.sampled_from([0.5, 1.5]),
)
def test_every_way_of_decoding_steers_the_same_tokens(
    model: VLM, vectors: torch.Tensor, batch: list[Request], positions: str, way: str, alpha: float
) -> None:
    inputs = encode(model, batch)
    options = WAYS[way]
    compared = {
        key: value
        for key, value in options.items()
        if key not in ("use_cache", "cache_implementation")
    }
    torch.manual_seed(5)
    expected = expected_of(model, inputs, vectors, alpha, positions, **compared)
    torch.manual_seed(5)
    with steer(model, vectors, Steering(alpha, positions=positions)):  # type: ignore[arg-type]
        steered = generated(model, inputs, **options)
    assert steered.tolist() == expected.tolist()


@MANY
@given(
    request_=requests,
    positions=st.sampled_from(POSITIONS),
    chunk=st.integers(1, 9),
    tokens=st.integers(1, 5),
)
def test_chunks_and_candidates_steer_the_same_tokens(
    model: VLM, vectors: torch.Tensor, request_: Request, positions: str, chunk: int, tokens: int
) -> None:
    inputs = encode(model, [request_])
    # the model itself fails on a looked-up piece of the image
    options = {"suppress_tokens": [model.image_token_id]}
    expected = expected_of(model, inputs, vectors, 1.0, positions, **options)
    setting = Steering(1.0, positions=positions)  # type: ignore[arg-type]
    with steer(model, vectors, setting):
        chunked = generated(model, inputs, prefill_chunk_size=chunk, **options)
    with steer(model, vectors, setting):
        looked_up = generated(model, inputs, prompt_lookup_num_tokens=tokens, **options)
    assert chunked.tolist() == expected.tolist()
    assert looked_up.tolist() == expected.tolist()


@MANY
@given(
    first=requests,
    more=words,
    positions=st.sampled_from(POSITIONS),
    new=st.integers(2, 5),
    inside=st.booleans(),
    only_new=st.booleans(),
)
def test_a_second_turn_on_its_cache(
    model: VLM,
    vectors: torch.Tensor,
    first: Request,
    more: str,
    positions: str,
    new: int,
    inside: bool,
    only_new: bool,
) -> None:
    """Both turns in one block, or in two; the whole conversation passed again, or its new tokens
    alone."""
    inputs = encode(model, [first])
    setting = Steering(1.0, positions=positions)  # type: ignore[arg-type]
    options: dict[str, Any] = {
        "return_dict_in_generate": True,
        "max_new_tokens": new,
        "min_new_tokens": new,
    }
    behind = torch.tensor([model.tokenizer(more)["input_ids"]])

    def second(out: Any) -> torch.Tensor:
        whole = torch.cat([out.sequences, behind], dim=1)
        cache = cache_of(out)
        ids = whole[:, cache.get_seq_length() :] if only_new else whole
        arguments = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(whole),
            **with_cache(model.model, cache),
        }
        return generated(model, arguments)[:, ids.shape[1] :]

    with torch.no_grad():
        if inside:
            with steer(model, vectors, setting):
                out = model.model.generate(**inputs, do_sample=False, **options)
                steered = second(out)
        else:
            with steer(model, vectors, setting):
                out = model.model.generate(**inputs, do_sample=False, **options)
            with steer(model, vectors, setting):
                steered = second(out)
    script = script_of(model, inputs)
    width = inputs["input_ids"].shape[1]
    run = width + new - 1  # the last token of the first reply was never run
    whole = torch.cat([out.sequences, behind], dim=1)
    script.turns = [Turn(0, width), Turn(run, whole.shape[1])]
    again = {**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
    with recomputed(model, telescoped(vectors, 1.0), script, positions):
        expected = generated(model, again, use_cache=False)[:, whole.shape[1] :]
    assert steered.tolist() == expected.tolist()


@MANY
@given(batch=st.lists(requests, min_size=1, max_size=3), positions=st.sampled_from(POSITIONS[:3]))
def test_right_padding_steers_the_same_tokens_as_left_padding(
    model: VLM, vectors: torch.Tensor, batch: list[Request], positions: str
) -> None:
    left = encode(model, batch)
    width = left["input_ids"].shape[1]
    right = dict(left)
    lengths = left["attention_mask"].sum(1).tolist()
    for key in ("input_ids", "attention_mask"):
        rows = [
            row[width - n :].tolist() + [0] * (width - n)
            for row, n in zip(left[key], lengths, strict=True)
        ]
        right[key] = torch.tensor(rows)
    setting = Steering(1.0, positions=positions)  # type: ignore[arg-type]
    with torch.no_grad(), steer(model, vectors, setting):
        logits = model.model(**right).logits
    with (
        torch.no_grad(),
        recomputed(model, telescoped(vectors, 1.0), script_of(model, right), positions),
    ):
        expected = model.model(**right).logits
    for row, n in enumerate(lengths):
        assert torch.allclose(logits[row, :n], expected[row, :n], atol=1e-4)


@MANY
@given(
    one=requests,
    other=requests,
    positions=st.sampled_from(POSITIONS),
    order=st.lists(st.integers(0, 1), min_size=2, max_size=6),
)
def test_conversations_in_any_order_are_steered_as_each_is_alone(
    model: VLM,
    vectors: torch.Tensor,
    one: Request,
    other: Request,
    positions: str,
    order: list[int],
) -> None:
    setting = Steering(1.0, positions=positions)  # type: ignore[arg-type]

    class Conversation:
        def __init__(self, request: Request) -> None:
            self.inputs = encode(model, [request])
            self.out = model.model(**self.inputs, use_cache=True)
            self.tokens: list[int] = []

        def step(self) -> torch.Tensor:
            self.tokens.append(int(self.out.logits[0, -1].argmax()))
            token = torch.tensor([[self.tokens[-1]]])
            self.out = model.model(input_ids=token, **with_cache(model.model, cache_of(self.out)))
            return self.out.logits[0, -1]

    with torch.no_grad():
        alone = []
        for request in (one, other):
            with steer(model, vectors, setting):
                conversation = Conversation(request)
                alone.append([conversation.step() for _ in range(len(order))])
        with steer(model, vectors, setting):
            both = [Conversation(request) for request in (one, other)]
            steps = [0, 0]
            for turn in order:
                logits = both[turn].step()
                assert torch.allclose(logits, alone[turn][steps[turn]], atol=1e-4)
                steps[turn] += 1
