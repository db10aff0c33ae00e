"""A tiny VLM for vLLM with an artifact, and what transformers says of it under hooks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own (tools/vllm_env.sh)")

import torch
from PIL import Image

import families
from cmrm import ShiftVectors, Steering, load_vlm
from cmrm.engines.transformers import TransformersEngine
from cmrm.engines.vllm.checkpoint import readable_by_vllm
from cmrm.model.encode import encode
from cmrm.model.identity import identity_of
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request, Turn
from cmrm.shift.artifact import Provenance
from cmrm.shift.resolve import resolved
from cmrm.steering.gate import Gate
from cmrm.steering.hooks import intervene

TOKENS = 8
TEXTS = (
    "How do I open this door?", "What is it?", "Tell me how a lock works, step by step.",
    "Which colour is the sky at night over the sea?",
)  # fmt: skip
COLOURS = ("red", None, "blue", None, "green", "white")


@dataclass
class Model:
    """A tiny VLM, its folder for vLLM, and an artifact."""

    vlm: VLM
    folder: Path
    shift: ShiftVectors
    path: Path


def requests() -> list[dict[str, Any]]:
    """A mixed batch: with and without an image, of several lengths."""
    return [
        {"text": TEXTS[k % len(TEXTS)] + "!" * (k // 4), "image": COLOURS[k % len(COLOURS)]}
        for k in range(8)
    ]


def build(root: Path) -> Model:
    """The model, saved below `root`, with an artifact whose gate opens for some requests."""
    os.environ["CMRM_CACHE"] = str(root / "cache")
    sizes = {
        "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_hidden_layers": 4, "initializer_range": 0.08,
    }  # fmt: skip
    made, processor = families.llava(**sizes)
    made.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    vlm = load_vlm(str(root / "model"))
    shape = (vlm.n_layers, vlm.hidden_size)
    draw = torch.Generator().manual_seed(4)
    vectors = 2.0 * torch.randn(shape, generator=draw)
    direction = torch.randn(shape, generator=draw)
    states = TransformersEngine(vlm).states([asked(r) for r in requests() if r["image"]])
    probe = torch.randn(1, vlm.hidden_size, generator=draw)
    scores = (states[:, 1] @ probe[0]).sort().values
    threshold = float((scores[1] + scores[2]) / 2)
    shift = ShiftVectors(
        vectors,
        Provenance(
            vlm.model_id, None, type(made).__name__, shape[1], shape[0], corruption="blank",
            estimator="pca",
        ),
        Steering(alpha=0.5), {"direction": direction}, identity=identity_of(vlm),
        gate=Gate("linear", (1,), probe, threshold),
    )  # fmt: skip
    shift.save(root / "shift.safetensors")
    return Model(vlm, readable_by_vllm(root / "model"), shift, root / "shift.safetensors")


def asked(request: dict[str, Any]) -> Request:
    image = request.get("image")
    pictures = () if image is None else (Image.new("RGB", (64, 64), image),)
    if "text" in request:
        return Request(request["text"], pictures)
    turns = [
        Turn(turn["role"], turn["content"], () if k else pictures)
        for k, turn in enumerate(request["messages"])
    ]
    return Request(turns[-1].text, before=tuple(turns[:-1]))


def hooks(
    model: Model, batch: Sequence[dict[str, Any]], steering: Steering | None = None
) -> list[dict[str, Any]]:
    """The same of transformers under hooks, one request at a time."""
    vlm, engine = model.vlm, TransformersEngine(model.vlm)
    replies = []
    for request in batch:
        one = asked(request)
        parts = []
        if steering is not None and one.all_images:
            parts = resolved(model.shift, steering, partial(engine.text_states, [one]))
        inputs = encode(vlm, [one])
        with torch.inference_mode(), intervene(vlm, *parts):
            out = vlm.model.generate(
                **inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        new = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        logs = [step[0].float().log_softmax(-1) for step in out.logits]
        replies.append({
            "prompt": inputs["input_ids"].shape[1], "tokens": new,
            "logprobs": [float(log[token]) for log, token in zip(logs, new, strict=True)],
        })  # fmt: skip
    return replies


def same(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> list[bool]:
    """Which replies have the same tokens, and log-probabilities within 2e-3."""
    return [
        a["prompt"] == b["prompt"] and a["tokens"] == b["tokens"]
        and max(abs(x - y) for x, y in zip(a["logprobs"], b["logprobs"], strict=True)) < 2e-3
        for a, b in zip(one, other, strict=True)
    ]  # fmt: skip
