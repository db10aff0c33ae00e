"""The residual stream at the last prompt token, after every decoder block, by hooks on the
blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from cmrm.errors import SteeringError
from cmrm.model.batching import in_batches
from cmrm.model.encode import encode, last_logits_alone, last_positions
from cmrm.model.layers import hidden_of
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request
from cmrm.steering.hooks import refuse_inside_steering


@dataclass(frozen=True, eq=False)
class Steps:
    """What is added to the recorded tokens while their states are read."""

    added: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """0-based decoder layer -> float32 [d]: added to its output; the state is recorded before."""
    until: int | None = None
    """Layer behind which the pass ends; None: it runs to its end."""


class _Reached(Exception):
    """The last layer that was asked for has run."""


class StateHooks:
    """Context manager that records, per decoder block, the states of chosen tokens while a model
    runs once."""

    def __init__(
        self,
        vlm: VLM,
        positions: torch.Tensor,
        rows: torch.Tensor | None = None,
        steps: Steps | None = None,
    ) -> None:
        """`positions`: int64 [N], within the tokens that are run; `rows`: int64 [N], the row of
        each.

        `rows` None: one position a row. `steps`: what is added to those states on the way.
        """
        self.vlm = vlm
        self.steps = steps or Steps()
        self.positions = positions
        self.rows = torch.arange(len(positions), device=positions.device) if rows is None else rows
        self.recorded: list[torch.Tensor | None] = [None] * vlm.n_layers
        self.handles: list[Any] = []

    def __enter__(self) -> StateHooks:
        for index, layer in enumerate(self.vlm.layers[: self._end]):
            self.handles.append(layer.register_forward_hook(self._recorder(index)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        return isinstance(error, _Reached)

    @property
    def _end(self) -> int:
        """Number of layers that are recorded."""
        until = self.steps.until
        return self.vlm.n_layers if until is None else until + 1

    def states(self) -> torch.Tensor:
        """float32 [N, L, d] on the CPU, up to the last layer that was asked for. A layer that a
        text-only prompt skips has the state of the layer before.

        Raises:
            SteeringError: a decoder layer did not run.
        """
        recorded = self.recorded[: self._end]
        for index in sorted(self.vlm.skippable):
            if 0 < index < self._end and recorded[index] is None:
                recorded[index] = recorded[index - 1]
        silent = [index for index, state in enumerate(recorded) if state is None]
        if silent:
            raise SteeringError(
                f"decoder layers {silent} did not run in the forward pass; nothing was captured "
                "there"
            )
        return torch.stack([state.float().cpu() for state in recorded if state is not None], dim=1)

    def _recorder(self, index: int) -> Callable[..., Any]:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
            hidden = hidden_of(output)
            rows, positions = self.rows.to(hidden.device), self.positions.to(hidden.device)
            self.recorded[index] = hidden[rows, positions]
            if index == self.steps.until:
                raise _Reached
            step = self.steps.added.get(index)
            if step is None:
                return None
            moved = hidden.clone()
            moved[rows, positions] += step.to(hidden.device, hidden.dtype)
            return moved if hidden is output else (moved, *output[1:])

        return hook


@torch.inference_mode()
def capture_inputs(
    vlm: VLM, inputs: dict[str, torch.Tensor], steps: Steps | None = None
) -> torch.Tensor:
    """States of one encoded batch: float32 [B, L, d] on the CPU; `[:, l]` is the output of decoder
    block l.

    `steps` are added to those states on the way. The last prompt token of a row is the last
    position where its attention mask is 1. A layer that a text-only prompt skips
    (`VLM.skippable`) has the state of the layer before it.

    Raises:
        ModelError: the model is in training mode. SteeringError: this context steers the model, or
            a decoder layer did not run.
    """
    refuse_inside_steering(vlm, "capturing states")
    vlm.check_eval()
    mask = inputs["attention_mask"]
    last = last_positions(mask)
    with vlm.lock, StateHooks(vlm, last, steps=steps) as hooks:
        vlm.model(**inputs, use_cache=False, **last_logits_alone(vlm))
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
