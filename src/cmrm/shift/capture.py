"""The residual stream at the last prompt token, after every decoder block, by hooks on the blocks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch

from cmrm.model.batching import in_batches
from cmrm.prompts.conditions import Request
from cmrm.errors import SteeringError
from cmrm.model.vlm import VLM, encode


class StateHooks:
    """Context manager that keeps, per decoder block, the states of chosen positions while a model runs once."""

    def __init__(self, vlm: VLM, positions: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """`positions`: int64 [N], within the tokens that are run; `rows`: int64 [N], the row of each (None: one a row)."""
        self.vlm = vlm
        self.positions = positions
        self.rows = torch.arange(len(positions), device=positions.device) if rows is None else rows
        self.kept: list[torch.Tensor | None] = [None] * vlm.n_layers
        self.handles: list[Any] = []

    def __enter__(self) -> StateHooks:
        for index, layer in enumerate(self.vlm.layers):
            self.handles.append(layer.register_forward_hook(self._keeper(index)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def states(self) -> torch.Tensor:
        """float32 [N, L, d] on the CPU. A layer that a text-only prompt skips hands on what the layer before it left.

        Raises:
            SteeringError: a decoder layer did not run.
        """
        kept = self.kept
        for index in sorted(self.vlm.skippable):
            if kept[index] is None and index > 0:
                kept[index] = kept[index - 1]
        silent = [index for index, state in enumerate(kept) if state is None]
        if silent:
            raise SteeringError(f"decoder layers {silent} did not run in the forward pass; nothing was captured there")
        return torch.stack([state.float().cpu() for state in kept if state is not None], dim=1)

    def _keeper(self, index: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            hidden = hidden_of(output)
            self.kept[index] = hidden[self.rows.to(hidden.device), self.positions.to(hidden.device)]

        return hook


@torch.inference_mode()
def capture_inputs(vlm: VLM, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """States of one encoded batch: float32 [B, L, d] on the CPU; `[:, l]` is the output of decoder block l.

    The last prompt token of a row is the last position where its attention mask is 1. A layer that a text-only prompt
    skips (`VLM.skippable`) hands on what the layer before it left: that is its state.

    Raises:
        SteeringError: a decoder layer did not run in the forward pass.
    """
    mask = inputs["attention_mask"]
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    extra: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(vlm.model.forward).parameters:
        extra["logits_to_keep"] = 1
    with StateHooks(vlm, last) as hooks:
        vlm.model(**inputs, **extra)
    return hooks.states()


def capture(
    vlm: VLM,
    requests: Iterable[Request],
    *,
    batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """States of many prompts: float32 [N, L, d] on the CPU, in the order given. `on_batch(n)` is told each batch's size."""
    states = []
    for batch, kept in in_batches(requests, batch_size, lambda batch: capture_inputs(vlm, encode(vlm, batch))):
        states.append(kept)
        if on_batch is not None:
            on_batch(len(batch))
    if not states:
        return torch.empty(0, vlm.n_layers, vlm.hidden_size)
    return torch.cat(states)


def hidden_of(output: Any) -> torch.Tensor:
    """The residual stream [B, T, d] in a decoder block's output, which is a tensor or a tuple that begins with it.

    Raises:
        SteeringError: the output has another form.
    """
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3:
        raise SteeringError(f"a decoder block returned {type(output).__name__}, expected states [batch, tokens, width]")
    return hidden
