"""States of the last few tokens of prompts, as interventions leave them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cmrm.errors import InputError
from cmrm.model.encode import encode, last_logits_alone, last_positions
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request
from cmrm.shift.capture import StateHooks
from cmrm.steering.hooks import intervene, refuse_inside_steering
from cmrm.steering.intervention import Intervention


@dataclass(frozen=True)
class PromptStates:
    """States of the last T tokens of B prompts; `[:, :, -1]` is the last prompt token."""

    states: torch.Tensor
    """float32 [B, L, T, d] on the CPU: outputs of the decoder blocks, behind every edit."""
    tokens: torch.Tensor
    """int64 [B, T]: ids of these tokens; -1 where a prompt has fewer than T, and its states there
    mean nothing."""

    @property
    def last(self) -> torch.Tensor:
        """States of the last prompt token, float32 [B, L, d]."""
        return self.states[:, :, -1]


@torch.inference_mode()
def prompt_states(
    vlm: VLM,
    requests: Sequence[Request],
    interventions: Sequence[Intervention] = (),
    *,
    trailing: int = 1,
) -> PromptStates:
    """States of one batch of prompts under interventions; one pass, without the cached prefix.

    Args:
        vlm: the model.
        requests: conversations, with or without images.
        interventions: made in order, on rows with an image alone. Those on generated tokens alone
            change no state of a prompt.
        trailing: number T of tokens at the end of each prompt, >= 1.

    Raises:
        InputError: `trailing` is below 1, or a request cannot be used. ModelError: the model is in
            training mode. SteeringError: this context steers the model, or an intervention cannot
            be made.
    """
    if trailing < 1:
        raise InputError(f"trailing is {trailing}; it is at least 1")
    refuse_inside_steering(vlm, "capturing states")
    vlm.check_eval()
    inputs = encode(vlm, requests)
    mask = inputs["attention_mask"]
    last = last_positions(mask)
    places = last[:, None] - torch.arange(trailing - 1, -1, -1, device=mask.device)
    inside = places >= mask.argmax(1)[:, None]
    places = places.clamp_min(0)
    rows = torch.arange(len(requests), device=mask.device).repeat_interleave(trailing)
    in_prompt = [part for part in interventions if part.positions != "generated"]
    with vlm.lock, intervene(vlm, *in_prompt), StateHooks(vlm, places.flatten(), rows) as hooks:
        vlm.model(**inputs, use_cache=False, **last_logits_alone(vlm))
    flat = hooks.states()
    states = flat.reshape(len(requests), trailing, *flat.shape[1:]).transpose(1, 2).contiguous()
    tokens = inputs["input_ids"].gather(1, places).masked_fill(~inside, -1)
    return PromptStates(states, tokens.cpu())
