"""Interventions on a transformers model, by hooks: a reversible context manager, gated by image.

Hooks stand behind decoder blocks. They never write in place, and come off on exit, also after an
exception. Which tokens are edited is decided before each pass (`steering.tracker`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextvars import Token
from types import TracebackType
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from cmrm.errors import SteeringError
from cmrm.model.layers import hidden_of
from cmrm.model.vlm import VLM
from cmrm.steering.intervention import Edit, Intervention, in_dtype
from cmrm.steering.passes import Pass
from cmrm.steering.positions import Conversation
from cmrm.steering.setting import Positions
from cmrm.steering.tracker import ACTIVE, Tracker, tracker_of


class Session:
    """Context manager: every pass of `vlm.model` in this context is edited by the interventions, in
    order.

    Passes of other threads and asyncio tasks are left alone; see `steering.tracker`.
    """

    def __init__(
        self,
        vlm: VLM,
        interventions: Sequence[Intervention],
        *,
        has_image: Sequence[bool] | torch.Tensor | None = None,
    ) -> None:
        """`has_image`: rows that hold an image; None: read from each prompt's `input_ids`.

        Raises:
            InputError: a layer is out of range, a vector has another width, or a vector does not
                fit into the model's dtype. ModelError: the model is in training mode.
        """
        vlm.check_eval()
        self.vlm = vlm
        self.interventions = tuple(interventions)
        self.has_image = None if has_image is None else torch.as_tensor(has_image, dtype=torch.bool)
        self.tracker: Tracker = tracker_of(vlm)
        self.positions: frozenset[Positions] = frozenset(
            part.positions for part in self.interventions
        )
        self.ungated: frozenset[Positions] = frozenset(
            part.positions for part in self.interventions if part.gate is None
        )
        self.gated = tuple(part for part in self.interventions if part.gate is not None)
        self.key = "+".join(part.key for part in self.interventions)
        self.edits: dict[int, list[tuple[int, Edit, Intervention]]] = {}
        self.readings: dict[int, list[tuple[int, int]]] = {}
        number = 0
        for which, part in enumerate(self.interventions):
            part.check(vlm.n_layers, vlm.hidden_size)
            for edit in part.edits:
                self.edits.setdefault(edit.layer, []).append((number, edit, part))
                number += 1
            if part.gate is not None and part.edits:
                for place, layer in enumerate(part.gate.layers):
                    self.readings.setdefault(layer, []).append((which, place))
        self._placed: dict[tuple[int, torch.device, torch.dtype], torch.Tensor] = {}
        for layer, edits in self.edits.items():
            device, dtype = _place_of(vlm.layers[layer], vlm.model.dtype)
            for index, edit, _ in edits:
                self._vector(index, edit, device, dtype)
        self.passes = 0
        """Passes that this context ran on the model."""
        self.tokens = 0
        """Tokens that were edited."""
        self.rows_decided = 0
        """Rows with an image, turn by turn, that a gate has decided on."""
        self.rows_open = 0
        """Those of them that are steered."""
        self.opened: torch.Tensor | None = None
        """bool [B]: rows of the first prompt that a gate read and opened for."""
        self.reached: set[int] = set()
        """Layers whose edits were made on at least one token."""
        self._untouched: dict[Conversation, set[int]] = {}
        self._seen: WeakSet[Conversation] = WeakSet()
        self._generated = False
        self._token: Token[tuple[Session, ...]] | None = None

    @property
    def watched(self) -> frozenset[int]:
        """Layers that are edited or read."""
        return frozenset(self.edits) | frozenset(self.readings)

    def __enter__(self) -> Session:
        self.tracker.open(self.vlm, self.watched, self._block_hook)
        self._token = ACTIVE.set((*ACTIVE.get(), self))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._token is not None
        try:
            ACTIVE.reset(self._token)
        except ValueError:  # closed in another context, as an abandoned generator is
            ACTIVE.set(tuple(session for session in ACTIVE.get() if session is not self))
        self.tracker.close(self.vlm, self.watched)
        if kind is None:
            self._check()

    def _check(self) -> None:
        """Refuse a run in which steering did nothing, though there was something to steer.

        Raises:
            SteeringError: no pass was run in this context, a layer was never reached, or a row with
                an image kept all its tokens as they were.
        """
        if not self.edits:
            return
        if self.passes == 0:
            raise SteeringError(
                "steering never reached the model: no forward pass was run in this thread inside "
                "the block. A thread that is to be steered starts with "
                "contextvars.copy_context().run"
            )
        rows = sum(len(untouched) for untouched in self._untouched.values())
        due = not self.positions <= {"generated"} or not self._generated
        if rows and due:
            shown = " and ".join(sorted(self.positions))
            raise SteeringError(
                f"steering touched no token of {rows} rows with an image: no token at positions "
                f"{shown!r} was run"
            )
        silent = sorted(set(self.edits) - self.reached) if self.tokens else []
        if silent:
            raise SteeringError(f"steering never reached decoder layers {silent}: they did not run")

    # What the tracker reports

    def began(self, conversation: Conversation, current: Pass) -> None:
        """A pass that is not one more generated token begins."""
        self.passes += 1
        self._generated |= current.decoding
        rows = current.shape[0]
        for intervention in self.interventions:
            needed = intervention.rows
            if needed is not None and rows % needed:
                raise SteeringError(f"vectors for {needed} rows were given, the model runs {rows}")
        counts = [0] * rows
        for positions in self.ungated:
            counts = [a + b for a, b in zip(counts, current.count(positions), strict=True)]
        self.tokens += sum(counts)
        for part in self.gated:
            if part.edits and not bool(current.last_prompt()[1].any()):
                self.tokens += sum(current.open_counts(part))
                due = current.count(part.positions)  # a closed gate has decided on them too
                counts = [a + b for a, b in zip(counts, due, strict=True)]
        if conversation in self._seen:
            untouched = self._untouched.pop(conversation, set())
        else:
            self._seen.add(conversation)
            untouched = {
                row for row, with_image in enumerate(conversation.gate.tolist()) if with_image
            }
        untouched = {row for row in untouched if counts[row] == 0}
        if untouched:
            self._untouched[conversation] = untouched

    def stepped(self, current: Pass) -> None:
        """One more generated token of each row is run, where the pass before did the same."""
        self.passes += 1
        for positions in self.ungated:
            self.tokens += sum(current.count(positions))
        for part in self.gated:
            if part.edits:
                self.tokens += sum(current.open_counts(part))

    def finished(self, conversation: Conversation | None) -> None:
        """`generate` has ended: a reply of one token has no generated token that was run."""
        if conversation is not None and self.positions <= {"generated"}:
            self._generated = True
            self._untouched.pop(conversation, None)

    # Edits

    def _block_hook(self, layer: int) -> Callable[[nn.Module, Any, Any], Any]:
        tracker = self.tracker

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if torch.compiler.is_compiling():
                current = tracker.latest
            else:
                current = tracker.passes.get(threading.get_ident())
                if current is None and tracker.active():
                    raise SteeringError(
                        f"decoder layer {layer} ran in a call that cmrm does not see; call the "
                        "whole model, not a part of it, inside steer()"
                    )
            if current is None or not current.sessions:
                return None
            plain = type(output) is torch.Tensor and output.dim() == 3
            hidden = output if plain else hidden_of(output)
            if tuple(hidden.shape[:2]) != current.shape:
                raise SteeringError(
                    f"decoder layer {layer} ran on {tuple(hidden.shape[:2])} positions, the model "
                    f"was called with {current.shape}; this model cannot be steered by position"
                )
            edited = hidden
            for session in current.sessions:
                edited = session.edit(layer, edited, current)
                if layer in session.readings:
                    session.read(layer, edited, current)
            if edited is hidden:
                return None
            return edited if hidden is output else (edited, *output[1:])

        return hook

    def edit(self, layer: int, hidden: torch.Tensor, current: Pass) -> torch.Tensor:
        """The output of a decoder block, [B, T, d], after this session's edits of the layer."""
        for index, edit, part in self.edits.get(layer, ()):
            positions = part.positions
            if not any(current.count(positions)):
                continue
            self.reached.add(layer)
            if edit.strength == 0 or (part.gate and not any(current.open_counts(part))):
                continue
            vector = _rows(self._vector(index, edit, hidden.device, hidden.dtype), hidden.shape[0])
            if edit.operator == "add" and edit.preserve_norm:
                moved = hidden + vector
                before = hidden.float().norm(dim=-1, keepdim=True)
                after = moved.float().norm(dim=-1, keepdim=True).clamp_min(1e-12)
                moved = (moved.float() * (before / after)).to(hidden.dtype)
                mask = current.open_factor(part, hidden) != 0
                hidden = torch.where(mask, moved, hidden)
            elif edit.operator == "add" and current.decoding:
                key = (index, self, hidden.device, hidden.dtype)
                if key not in current.addends:
                    current.addends[key] = current.open_factor(part, hidden) * vector
                hidden = hidden + current.addends[key]
            elif edit.operator == "add":
                hidden = torch.addcmul(hidden, current.open_factor(part, hidden), vector)
            else:
                hidden = _moved(edit, hidden, vector, current.open_factor(part, hidden))
        return hidden

    def read(self, layer: int, hidden: torch.Tensor, current: Pass) -> None:
        """Read the states that gates decide by; behind its last layer a gate decides.

        Raises:
            SteeringError: the prompt is run by compiled code, which cannot decide.
        """
        for which, place in self.readings[layer]:
            part = self.interventions[which]
            gate, conversation = part.gate, current.conversation
            assert gate is not None
            assert conversation is not None
            if current.decoding:
                continue
            if torch.compiler.is_compiling():
                raise SteeringError(
                    "a gate cannot decide inside a compiled prefill; compile the decoding alone"
                )
            places, inside = current.last_prompt()
            if not bool(inside.any()):
                continue
            rows = torch.arange(hidden.shape[0], device=hidden.device)
            states = hidden[rows, places.to(hidden.device)]
            scores = current.scores.get((id(self), which))
            if scores is None:
                scores = torch.full((hidden.shape[0],), gate.bias)
            scores = scores + gate.weights[place] * gate.layer_score(place, states).cpu()
            current.scores[id(self), which] = scores
            if layer == gate.layers[-1]:
                self._decide(part, scores > gate.threshold, inside.cpu(), current, conversation)

    def _decide(
        self,
        part: Intervention,
        rows_open: torch.Tensor,
        inside: torch.Tensor,
        current: Pass,
        conversation: Conversation,
    ) -> None:
        """Hold a gate's decision for the rows whose last prompt token is in this pass."""
        with_image = conversation.gate.cpu()
        fresh, opened = current.decide(part, rows_open & with_image, inside)
        self.tokens += sum(current.open_counts(part))
        self.opened = opened if self.opened is None else self.opened
        self.rows_decided += int((fresh & with_image).sum())
        self.rows_open += int((fresh & opened).sum())
        untouched = self._untouched.get(conversation, set())
        untouched -= set(inside.nonzero().flatten().tolist())
        if not untouched:
            self._untouched.pop(conversation, None)

    def _vector(
        self, index: int, edit: Edit, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        """What is added ([d] or [R, d], strength included), or the vector of the other
        operators."""
        key = (index, device, dtype)
        if key not in self._placed:
            vector = edit.vector.float()
            if edit.operator == "add":
                vector = edit.strength * vector
            self._placed[key] = in_dtype(vector.to(device), edit.layer, dtype)
        return self._placed[key]


def _moved(
    edit: Edit, hidden: torch.Tensor, vector: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    """States after the operators that depend on the state, at the chosen tokens."""
    if edit.operator == "project":
        coordinate = (
            (hidden * vector).sum(dim=-1, keepdim=True)
            if vector.dim() == 3
            else (hidden @ vector)[..., None]
        )
        return hidden - edit.strength * factor * coordinate * vector
    states, direction = hidden.float(), vector.float()
    if edit.operator == "affine":
        assert edit.matrix is not None
        step = states @ edit.matrix.to(hidden.device).T + direction
    elif edit.operator == "oppose":
        assert edit.origin is not None
        centred = states - edit.origin.to(hidden.device)
        cosine = torch.nn.functional.cosine_similarity(centred, direction, dim=-1)
        length = states.norm(dim=-1, keepdim=True)
        step = length * torch.relu(-cosine)[..., None] * direction
    else:
        assert edit.target is not None
        target = edit.target.float().to(hidden.device)
        if target.dim() == 1:
            target = target.repeat_interleave(hidden.shape[0] // len(target))[:, None, None]
        coordinate = (states * direction).sum(dim=-1, keepdim=True)
        step = torch.relu(target - coordinate) * direction
    return hidden + (edit.strength * factor.float() * step).to(hidden.dtype)


def _rows(vector: torch.Tensor, rows: int) -> torch.Tensor:
    """[d], or [B, 1, d]: a search that keeps several candidates of a prompt repeats the prompt's
    vector."""
    if vector.dim() == 1:
        return vector
    if rows % vector.shape[0]:
        raise SteeringError(f"vectors for {vector.shape[0]} rows were given, the model runs {rows}")
    return vector.repeat_interleave(rows // vector.shape[0], dim=0)[:, None, :]


def _place_of(block: nn.Module, dtype: torch.dtype) -> tuple[torch.device, torch.dtype]:
    """Where a block computes: its first plain parameter's device (the CPU where it is offloaded),
    and the model's dtype."""
    for parameter in block.parameters():
        if parameter.device.type != "meta":
            return parameter.device, dtype
    return torch.device("cpu"), dtype


def intervene(
    vlm: VLM, *interventions: Intervention, has_image: Sequence[bool] | torch.Tensor | None = None
) -> Session:
    """Apply interventions to every pass of `vlm.model` inside the block: `with intervene(vlm,
    edits): ...`.

    Raises:
        InputError, ModelError: as `Session`. SteeringError: inside, before a pass that cannot be
            classified; on exit, when a row with an image was not touched, or a chosen layer never
            ran.
    """
    return Session(vlm, interventions, has_image=has_image)


def refuse_inside_steering(vlm: VLM, action: str) -> None:
    """Raise `SteeringError` when this context steers the model: `action` reads or needs the
    untouched model."""
    if tracker_of(vlm).active():
        raise SteeringError(
            f"{action} inside steer() would see the steered model; do it outside of the block"
        )
