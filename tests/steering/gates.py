"""What tests know of a gate: its decisions by plain passes over whole prompts, turn by turn.

The gate reads layers that no edit stands in or below, so that what it decides does not depend on
the steering.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cmrm import wrap_vlm
from cmrm.model.vlm import VLM
from cmrm.steering.gate import Gate
from cmrm.steering.intervention import Edit, Intervention
from steering.reference import Script, Turn
from tiny import tiny_model, tiny_processor

READ = (0, 1)
STEERED = (2, 3)
WEIGHTS = (0.7, 0.3)
GATED = ("last", "last_prompt", "generated")


def four_layers() -> VLM:
    """A tiny model with two layers to read and two to steer."""
    return wrap_vlm(tiny_model(n_layers=4), tiny_processor(), model_id="tiny4")


def probe_vectors(model: VLM, seed: int = 1) -> torch.Tensor:
    """float32 [2, d]: what the gate scores its layers by."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(READ), model.hidden_size, generator=generator)


def scores_of(model: VLM, inputs: dict[str, torch.Tensor], *, seed: int = 1) -> torch.Tensor:
    """Scores float64 [B] of whole prompts, by hooks of the test's own."""
    seen: dict[int, torch.Tensor] = {}

    def hook_of(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            seen[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [model.layers[layer].register_forward_hook(hook_of(layer)) for layer in READ]
    with torch.no_grad():
        model.model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    vectors, total = probe_vectors(model, seed), 0.0
    last = [max(k for k, real in enumerate(row) if real) for row in inputs["attention_mask"]]
    for weight, vector, layer in zip(WEIGHTS, vectors, READ, strict=True):
        states = torch.stack([seen[layer][row, column] for row, column in enumerate(last)])
        total = total + weight * (states.double() @ vector.double())
    assert isinstance(total, torch.Tensor)
    return total


def gate_at(model: VLM, threshold: float, *, seed: int = 1) -> Gate:
    """The gate that `scores_of` speaks of."""
    return Gate("linear", READ, probe_vectors(model, seed), threshold, weights=WEIGHTS)


def edits_of(model: VLM, strength: float = 1.0, seed: int = 7) -> tuple[Edit, ...]:
    """Edits of the layers above the gate."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        Edit(layer, 3 * torch.randn(model.hidden_size, generator=generator), strength=strength)
        for layer in STEERED
    )


def deltas_of(edits: Sequence[Edit]) -> dict[int, torch.Tensor]:
    """What is added, by layer."""
    return {edit.layer: edit.strength * edit.vector for edit in edits}


def gated(model: VLM, threshold: float, positions: str = "last", **more: Any) -> Intervention:
    """Edits behind the gate of this module."""
    return Intervention(edits_of(model, **more), positions, gate_at(model, threshold))  # type: ignore[arg-type]


@dataclass
class GatedScript(Script):
    """A script with a decision for each turn and row."""

    opened: list[list[bool]] = field(default_factory=list)

    def steered(self, row: int, column: int, positions: str) -> bool:
        turn = max(k for k, turn in enumerate(self.turns) if column >= turn.start)
        return self.opened[turn][row] and super().steered(row, column, positions)


def script_of(
    model: VLM,
    inputs: dict[str, torch.Tensor],
    threshold: float,
    turns: Sequence[Turn] | None = None,
) -> GatedScript:
    """What follows from the tokens of a whole conversation, by plain loops over them."""
    gate, last_image, real = [], [], []
    mask = inputs["attention_mask"]
    for ids, row in zip(inputs["input_ids"].tolist(), mask.tolist(), strict=True):
        places = [k for k, token in enumerate(ids) if token == model.image_token_id]
        gate.append(bool(places))
        last_image.append(places[-1] if places else -1)
        real.append([bool(value) for value in row])
    told = list(turns or [Turn(0, mask.shape[1])])
    opened = []
    for turn in told:
        cut = {
            name: value[:, : turn.prompt_end] if name in ("input_ids", "attention_mask") else value
            for name, value in inputs.items()
        }
        opened.append((scores_of(model, cut) > threshold).tolist())
    return GatedScript(gate, told, last_image, real, opened)
