"""Random conversations behind a gate, against the slow reference that recomputes whole prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmrm.model.compat import cache_of, with_cache
from cmrm.model.encode import encode
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request
from cmrm.steering.hooks import intervene
from steering.gates import GATED, deltas_of, edits_of, four_layers, gated, scores_of, script_of
from steering.reference import Turn, recomputed
from steering.test_positions_property import MANY, WAYS, generated, requests, words

thresholds = st.sampled_from(["low", "middle", "high"])


@pytest.fixture(scope="module")
def model() -> VLM:
    return four_layers()


def level(model: VLM, inputs: dict[str, torch.Tensor], where: str) -> float:
    """A threshold at which none, some or all rows are open, far from every score."""
    scores = scores_of(model, inputs).sort().values
    low, high = float(scores[0]) - 1.0, float(scores[-1]) + 1.0
    gaps = scores.diff()
    if where != "middle" or not len(gaps) or float(gaps.max()) < 0.01:
        return high if where == "high" else low
    widest = int(gaps.argmax())
    return float((scores[widest] + scores[widest + 1]) / 2)


@MANY
@given(
    batch=st.lists(requests, min_size=1, max_size=3),
    positions=st.sampled_from(GATED),
    way=st.sampled_from(sorted(WAYS)),
    where=thresholds,
)
def test_every_way_of_decoding_steers_the_same_tokens(
    model: VLM, batch: list[Request], positions: str, way: str, where: str
) -> None:
    inputs = encode(model, batch)
    # without a cache the model itself fails on one more token of an image
    options = {"suppress_tokens": [model.image_token_id], **WAYS[way]}
    threshold = level(model, inputs, where)
    compared = {
        key: value
        for key, value in options.items()
        if key not in ("use_cache", "cache_implementation")
    }
    torch.manual_seed(5)
    script = script_of(model, inputs, threshold)
    with recomputed(model, deltas_of(edits_of(model)), script, positions):
        expected = generated(model, inputs, use_cache=False, **compared)
    torch.manual_seed(5)
    with intervene(model, gated(model, threshold, positions)):
        steered = generated(model, inputs, **options)
    assert steered.tolist() == expected.tolist()


@MANY
@given(
    request_=requests,
    positions=st.sampled_from(GATED),
    chunk=st.integers(1, 9),
    tokens=st.integers(1, 5),
    where=st.sampled_from(["low", "high"]),
)
def test_chunks_and_candidates_steer_the_same_tokens(
    model: VLM, request_: Request, positions: str, chunk: int, tokens: int, where: str
) -> None:
    inputs = encode(model, [request_])
    threshold = level(model, inputs, where)
    options: dict[str, Any] = {"suppress_tokens": [model.image_token_id]}
    script = script_of(model, inputs, threshold)
    with recomputed(model, deltas_of(edits_of(model)), script, positions):
        expected = generated(model, inputs, use_cache=False, **options)
    for more in ({"prefill_chunk_size": chunk}, {"prompt_lookup_num_tokens": tokens}):
        with intervene(model, gated(model, threshold, positions)) as session:
            steered = generated(model, inputs, **options, **more)
        assert steered.tolist() == expected.tolist()
        with_image = int(script.gate[0])
        assert session.rows_decided == with_image
        assert session.rows_open == (with_image if where == "low" else 0)


@MANY
@given(
    first=requests,
    more=words,
    positions=st.sampled_from(GATED),
    new=st.integers(2, 5),
    only_new=st.booleans(),
    inside=st.booleans(),
    between=st.sampled_from([-2.0, -0.5, -0.1, 0.1, 0.5, 2.0]),
)
def test_a_second_turn_is_decided_anew(
    model: VLM,
    first: Request,
    more: str,
    positions: str,
    new: int,
    only_new: bool,
    inside: bool,
    between: float,
) -> None:
    inputs = encode(model, [first])
    threshold = float(scores_of(model, inputs)[0]) + between
    part = gated(model, threshold, positions)
    behind = torch.tensor([model.tokenizer(more)["input_ids"]])
    quiet: dict[str, Any] = {"suppress_tokens": [model.image_token_id]}
    options = {"return_dict_in_generate": True, "max_new_tokens": new, "min_new_tokens": new}

    def second(out: Any) -> torch.Tensor:
        whole = torch.cat([out.sequences, behind], dim=1)
        cache = cache_of(out)
        ids = whole[:, cache.get_seq_length() :] if only_new else whole
        arguments = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(whole),
            **with_cache(model.model, cache),
        }
        return generated(model, arguments, **quiet)[:, ids.shape[1] :]

    with torch.no_grad():
        with intervene(model, part):
            out = model.model.generate(**inputs, do_sample=False, **options, **quiet)
            steered = second(out) if inside else None
        if steered is None:
            with intervene(model, part):
                steered = second(out)
    width = inputs["input_ids"].shape[1]
    whole = torch.cat([out.sequences, behind], dim=1)
    again = {**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
    turns = [Turn(0, width), Turn(width + new - 1, whole.shape[1])]
    script = script_of(model, again, threshold, turns)
    with recomputed(model, deltas_of(edits_of(model)), script, positions):
        expected = generated(model, again, use_cache=False, **quiet)[:, whole.shape[1] :]
    assert steered.tolist() == expected.tolist()


@MANY
@given(batch=st.lists(requests, min_size=1, max_size=3), where=thresholds)
def test_right_padding_decides_as_left_padding_does(
    model: VLM, batch: list[Request], where: str
) -> None:
    left = encode(model, batch)
    threshold = level(model, left, where)
    width, right = left["input_ids"].shape[1], dict(left)
    lengths = left["attention_mask"].sum(1).tolist()
    for key in ("input_ids", "attention_mask"):
        rows = [
            row[width - n :].tolist() + [0] * (width - n)
            for row, n in zip(left[key], lengths, strict=True)
        ]
        right[key] = torch.tensor(rows)
    with torch.no_grad(), intervene(model, gated(model, threshold)):
        logits = model.model(**right).logits
    script = script_of(model, right, threshold)
    with torch.no_grad(), recomputed(model, deltas_of(edits_of(model)), script, "last"):
        expected = model.model(**right).logits
    for row, n in enumerate(lengths):
        assert torch.allclose(logits[row, :n], expected[row, :n], atol=1e-4)
