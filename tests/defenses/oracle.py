"""States of a tiny model under plain functions, as the papers' equations have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from PIL import Image

from cmrm.defenses import Defense
from cmrm.engines.base import Reply
from cmrm.engines.transformers import TransformersEngine
from cmrm.model.encode import encode
from cmrm.model.layers import hidden_of
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request
from cmrm.steering.hooks import intervene

Function = Callable[[torch.Tensor], torch.Tensor]
SEEN = [
    Request("Tell me about red paint", (Image.new("RGB", (20, 16), "red"),)),
    Request("Tell me about the sky, please", (Image.new("RGB", (20, 16), "blue"),)),
]
UNSEEN = Request("Tell me about green paint")


def states(vlm: VLM, requests: Sequence[Request], *contexts: Any) -> torch.Tensor:
    """float32 [N, L, d] at the last prompt token, read behind whatever `contexts` do to blocks."""
    read: list[torch.Tensor] = []

    def record(module: Any, inputs: Any, output: Any) -> None:
        read.append(hidden_of(output)[:, -1].float().clone())

    with ExitStack() as stack, torch.inference_mode():
        for context in contexts:
            stack.enter_context(context)
        for layer in vlm.layers:
            stack.callback(layer.register_forward_hook(record).remove)
        vlm.model(**encode(vlm, requests))
    return torch.stack(read, dim=1)


def defended(
    engine: TransformersEngine, defense: Defense, requests: Sequence[Request]
) -> torch.Tensor:
    """`states` of what a defence asks, under its interventions."""
    asked = defense.rewrite(engine, requests)
    keys = [request.text for request in asked]
    interventions = defense.intervene(engine, asked, keys)
    return states(
        engine.vlm, asked, *([intervene(engine.vlm, *interventions)] if interventions else [])
    )


def changed(
    vlm: VLM, requests: Sequence[Request], functions: Mapping[int, Function]
) -> torch.Tensor:
    """`states` when plain functions replace each block's output [B, T, d] in rows with an image."""
    rows = torch.tensor([bool(request.images) for request in requests])[:, None, None]

    def replace(function: Function) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> Any:
            return torch.where(rows, function(output), output)

        return hook

    with ExitStack() as stack:
        for layer, function in functions.items():
            handle = vlm.layers[layer].register_forward_hook(replace(function))
            stack.callback(handle.remove)
        return states(vlm, requests)


class Scripted:
    """An engine that gives the answers of a list, and keeps what it was asked."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers, self.asked = list(answers), list[list[Request]]()

    def answer(self, requests: Sequence[Request], *more: Any, **options: Any) -> list[Reply]:
        self.asked.append(list(requests))
        return [Reply(text, len(text)) for text in self.answers[len(self.asked) - 1]]
