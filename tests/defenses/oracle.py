"""States of a tiny model under plain functions, as the papers' equations have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from PIL import Image

from cmrm import Sample
from cmrm.defenses import Defense, FitData, make_defense
from cmrm.engines.base import Engine, Reply
from cmrm.model.encode import encode
from cmrm.model.layers import hidden_of
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request, build_requests
from cmrm.steering.hooks import intervene
from tiny import vlm_of

Function = Callable[[torch.Tensor], torch.Tensor]
SEEN = [
    Request("Tell me about red paint", (Image.new("RGB", (20, 16), "red"),)),
    Request("Tell me about the sky, please", (Image.new("RGB", (20, 16), "blue"),)),
]
UNSEEN = Request("Tell me about green paint")


def anchor_set() -> FitData:
    """12 harmful-like and 24 benign anchors, each with an image."""
    colours = ["red", "green", "blue", "yellow"]
    harmful = [
        Sample(f"a{k}", f"Tell me about {c} paint" + "!" * k, Image.new("RGB", (20 + k, 16), c))
        for k, c in enumerate(colours * 3)
    ]
    benign = [
        Sample(f"b{k}", f"How do I cook dish {k}?", Image.new("RGB", (16, 16 + k), c))
        for k, c in enumerate(colours * 6)
    ]
    return FitData(harmful, benign, 4)


def fitted(engine: Engine, data: FitData, name: str, **settings: Any) -> Defense:
    """A defence with settings, fitted."""
    defense = make_defense(name, {name: settings} if settings else None)
    defense.fit(engine, data)
    return defense


def all_states(vlm: VLM, samples: Sequence[Sample], condition: str) -> torch.Tensor:
    """States [N, L, d] of samples under a condition, each in a batch of its own."""
    requests = build_requests(list(samples), condition)
    return torch.cat([states(vlm, [request]) for request in requests])


def at_the_end(step: Callable[[torch.Tensor], torch.Tensor]) -> Function:
    """The function of a block's output [B, T, d] that adds `step` of the last token's state."""

    def edit(hidden: torch.Tensor) -> torch.Tensor:
        whole = hidden.clone()
        whole[:, -1] += step(hidden[:, -1])
        return whole

    return edit


def adding(vectors: torch.Tensor) -> Function:
    """The function of a block's output that adds `vectors` [B, d] to the last token's state."""
    return at_the_end(lambda state: vectors)


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


def defended(engine: Engine, defense: Defense, requests: Sequence[Request]) -> torch.Tensor:
    """`states` of what a defence asks, under its interventions."""
    asked = defense.rewrite(engine, requests)
    keys = [request.text for request in asked]
    interventions = defense.intervene(engine, asked, keys)
    return states(
        vlm_of(engine),
        asked,
        *([intervene(vlm_of(engine), *interventions)] if interventions else []),
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
