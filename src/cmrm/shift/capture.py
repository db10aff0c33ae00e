"""The residual stream at the last prompt token, after every decoder block, by hooks on the
blocks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch

from cmrm.errors import SteeringError
from cmrm.model.batching import in_batches
from cmrm.model.encode import encode
from cmrm.model.layers import hidden_of
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request
from cmrm.steering.hooks import refuse_inside_steering


class StateHooks:
    """Context manager that records, per decoder block, the states of chosen tokens while a model
    runs once."""

    def __init__(self, vlm: VLM, positions: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """`positions`: int64 [N], within the tokens that are run; `rows`: int64 [N], the row of
        each.

        `rows` None: one position a row.
        """
        self.vlm = vlm
        self.positions = positions
        self.rows = torch.arange(len(positions), device=positions.device) if rows is None else rows
        self.recorded: list[torch.Tensor | None] = [None] * vlm.n_layers
        self.handles: list[Any] = []

    def __enter__(self) -> StateHooks:
        for index, layer in enumerate(self.vlm.layers):
            self.handles.append(layer.register_forward_hook(self._recorder(index)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def states(self) -> torch.Tensor:
        """float32 [N, L, d] on the CPU. A layer that a text-only prompt skips has the state of the
        layer before.

        Raises:
            SteeringError: a decoder layer did not run.
        """
        recorded = self.recorded
        for index in sorted(self.vlm.skippable):
            if recorded[index] is None and index > 0:
                recorded[index] = recorded[index - 1]
        silent = [index for index, state in enumerate(recorded) if state is None]
        if silent:
            raise SteeringError(
                f"decoder layers {silent} did not run in the forward pass; nothing was captured "
                "there"
            )
        return torch.stack([state.float().cpu() for state in recorded if state is not None], dim=1)

    def _recorder(self, index: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            hidden = hidden_of(output)
            rows, positions = self.rows.to(hidden.device), self.positions.to(hidden.device)
            self.recorded[index] = hidden[rows, positions]

        return hook


@torch.inference_mode()
def capture_inputs(vlm: VLM, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """States of one encoded batch: float32 [B, L, d] on the CPU; `[:, l]` is the output of decoder
    block l.

    The last prompt token of a row is the last position where its attention mask is 1. A layer that
    a text-only prompt skips (`VLM.skippable`) has the state of the layer before it.

    Raises:
        ModelError: the model is in training mode. SteeringError: this context steers the model, or
            a decoder layer did not run.
    """
    refuse_inside_steering(vlm, "capturing states")
    vlm.check_eval()
    mask = inputs["attention_mask"]
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(vlm.model.forward).parameters:
        options["logits_to_keep"] = 1
    with vlm.lock, StateHooks(vlm, last) as hooks:
        vlm.model(**inputs, **options)
    return hooks.states()


def capture(
    vlm: VLM,
    requests: Iterable[Request],
    *,
    batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """States of many prompts: float32 [N, L, d] on the CPU, in the order given.

    `on_batch(n)` is called after each batch with its size.

    Raises:
        InputError, ModelError, SteeringError: as `encode` and `capture_inputs`.
    """
    states = []
    work = in_batches(requests, batch_size, lambda batch: capture_inputs(vlm, encode(vlm, batch)))
    for batch, captured in work:
        states.append(captured)
        if on_batch is not None:
            on_batch(len(batch))
    if not states:
        return torch.empty(0, vlm.n_layers, vlm.hidden_size)
    return torch.cat(states)
