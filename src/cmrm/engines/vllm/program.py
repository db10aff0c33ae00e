"""An artifact under a setting as a program for batches of tokens: no rows, no Python in a pass.

The residual stream of vLLM's decoder layers is the sum of their two outputs, hidden and residual.
What a program does at layer l, with m the mask of steered tokens [T, 1] and o the held decision of
the harm gate [T, 1] (1 without a gate):

    add     hidden <- hidden + m o alpha delta_l
    fill    hidden <- hidden + m o alpha relu(target_l - h . r_l) r_l,  h = hidden + residual

Sums are in float32, as in `steering.hooks`; what is added has the model's dtype.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load, save

from cmrm.engines.vllm.board import Board
from cmrm.errors import InputError
from cmrm.shift.artifact import ShiftVectors
from cmrm.shift.resolve import gate_of, needs_text, settled
from cmrm.steering.gate import Gate
from cmrm.steering.intervention import Edit, Intervention, in_dtype, shift_intervention
from cmrm.steering.setting import Positions, Steering

GATE_FACTS = ("kind", "layers", "threshold", "weights", "bias")
"""Fields of a linear gate beside its vectors."""
NO_NORM = "preserve_norm is not built in vLLM"


@dataclass(frozen=True, eq=False)
class Program:
    """What is done to tokens at each decoder layer."""

    positions: Positions
    """Which tokens; see `steering.setting`."""
    adds: dict[int, torch.Tensor]
    """Layer -> float32 [d], strength included."""
    fills: dict[int, torch.Tensor] = field(default_factory=dict)
    """Layer -> unit direction, float32 [d]; its targets are in the order of these layers."""
    strength: float = 1.0
    """Of `fills`."""
    gate: Gate | None = None
    """Which rows with an image; None: all."""
    reads: tuple[int, ...] = ()
    """Layers whose state at the last prompt token is kept for requests that ask for it; eager
    alone."""

    @classmethod
    def of(cls, shift: ShiftVectors, steering: Steering | None = None) -> Program:
        """The program of an artifact; the recommended setting when None.

        Raises:
            InputError: the artifact does not hold what the setting needs, or vLLM's graph cannot
                express it.
        """
        steering = settled(shift, steering)
        gate = gate_of(shift, steering)
        _check_gate(gate)
        if steering.preserve_norm:
            raise InputError(NO_NORM)
        if needs_text(steering):
            assert shift.direction is not None
            unit = shift.direction / shift.direction.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            layers = steering.chosen_layers(len(unit))
            fills = {layer: unit[layer].float() for layer in layers}
            return cls(steering.positions, {}, fills, float(steering.alpha), gate)
        if steering.operator == "fill":
            return cls(steering.positions, {}, gate=gate)
        vectors = shift.vectors
        if steering.kind == "sequential":
            assert shift.sequential is not None
            vectors = shift.sequential
        edits = shift_intervention(vectors, steering, gate).edits
        adds = {edit.layer: edit.strength * edit.vector.float() for edit in edits}
        return cls(steering.positions, adds, gate=gate)

    @classmethod
    def of_interventions(cls, parts: Sequence[Intervention]) -> Program:
        """The program that does what interventions do; `targets_of` has the rows' targets.

        Raises:
            InputError: vLLM's graph cannot express them; what it is, is named.
        """
        if not parts:
            return cls("last", {})
        gates = {None if part.gate is None else part.gate.key for part in parts}
        positions = {part.positions for part in parts}
        if len(gates) > 1 or len(positions) > 1:
            raise InputError("several interventions with different positions or gates")
        gate = parts[0].gate
        _check_gate(gate)
        adds: dict[int, torch.Tensor] = {}
        fills: dict[int, torch.Tensor] = {}
        strengths = set()
        for edit in (edit for part in parts for edit in part.edits):
            _check_edit(edit)
            if edit.layer in fills or (edit.operator == "fill" and edit.layer in adds):
                raise InputError(f"several edits at decoder layer {edit.layer}, one of them `fill`")
            if edit.operator == "fill":
                fills[edit.layer] = edit.vector.float()
                strengths.add(float(edit.strength))
            else:
                moved = edit.strength * edit.vector.float()
                adds[edit.layer] = adds[edit.layer] + moved if edit.layer in adds else moved
        if len(strengths) > 1:
            raise InputError("`fill` with a strength for each layer")
        return cls(parts[0].positions, adds, fills, strengths.pop() if strengths else 1.0, gate)

    def to_bytes(self) -> bytes:
        """Everything as safetensors, for vLLM's workers."""
        tensors = {f"add.{layer}": tensor for layer, tensor in self.adds.items()}
        tensors |= {f"fill.{layer}": tensor for layer, tensor in self.fills.items()}
        facts: dict[str, Any] = {
            "positions": self.positions, "strength": self.strength, "reads": self.reads,
        }  # fmt: skip
        if self.gate is not None:
            tensors["gate"] = self.gate.vectors
            facts["gate"] = {name: getattr(self.gate, name) for name in GATE_FACTS}
        whole = {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}
        return save(whole or {"none": torch.zeros(1)}, {"program": json.dumps(facts)})

    @classmethod
    def from_bytes(cls, content: bytes) -> Program:
        """What `to_bytes` wrote."""
        tensors = load(content)
        length = int.from_bytes(content[:8], "little")
        facts = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["program"])

        def part(kind: str) -> dict[int, torch.Tensor]:
            names = [name for name in tensors if name.startswith(f"{kind}.")]
            return {int(name.partition(".")[2]): tensors[name] for name in names}

        gate = facts.get("gate")
        if gate is not None:
            gate["weights"] = tuple(gate["weights"])
        return cls(
            facts["positions"], part("add"), part("fill"), facts["strength"],
            None if gate is None else Gate(vectors=tensors["gate"], **gate), tuple(facts["reads"]),
        )  # fmt: skip

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers at which something is read or done, in ascending order."""
        read = () if self.gate is None else self.gate.layers
        return tuple(sorted({*self.adds, *self.fills, *read, *self.reads}))

    @property
    def key(self) -> str:
        """Hex sha256 of everything: equal for programs that do the same."""
        digest = hashlib.sha256(f"{self.positions} {self.strength!r}".encode())
        for kind, tensors in (("add", self.adds), ("fill", self.fills)):
            for layer, tensor in sorted(tensors.items()):
                digest.update(f"\x00{kind} {layer} {tuple(tensor.shape)}".encode())
                digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
        if self.gate is not None:
            digest.update(f"\x00gate {self.gate.key}".encode())
        if self.reads:
            digest.update(f"\x00reads {self.reads}".encode())
        return digest.hexdigest()

    def check(self, n_layers: int, width: int) -> None:
        """Refuse a model of another shape.

        Raises:
            InputError: a layer is out of range, or a vector has another width.
        """
        tensors = [*self.adds.values(), *self.fills.values()]
        if self.gate is not None:
            tensors.append(self.gate.vectors[0])
        if any(tensor.shape[-1] != width for tensor in tensors) or any(
            not 0 <= layer < n_layers for layer in self.layers
        ):
            raise InputError(
                f"the artifact does not fit a model with {n_layers} decoder layers of width {width}"
            )

    def step(self, layer: int, dtype: torch.dtype, device: torch.device) -> Step:
        """What is done at one layer, its tensors in place.

        Raises:
            InputError: the model's dtype does not hold what is added.
        """
        columns = {filled: column for column, filled in enumerate(sorted(self.fills))}
        gate = self.gate if self.gate is not None and layer in self.gate.layers else None
        add, fill = self.adds.get(layer), self.fills.get(layer)
        return Step(
            add=None if add is None else in_dtype(add.to(device), layer, dtype),
            fill=None if fill is None else fill.to(device, torch.float32),
            column=columns.get(layer, -1),
            strength=self.strength,
            read=None if gate is None else self._read(gate, layer).to(device, torch.float32),
            decides=gate is not None and layer == gate.layers[-1],
            threshold=0.0 if gate is None else float(gate.threshold - gate.bias),
            kept=layer if layer in self.reads else None,
        )

    def _read(self, gate: Gate, layer: int) -> torch.Tensor:
        place = gate.layers.index(layer)
        return gate.weights[place] * gate.vectors[place].float()


def _check_gate(gate: Gate | None) -> None:
    if gate is not None and gate.kind != "linear":
        raise InputError(
            f"the gate is of the kind {gate.kind}; in vLLM the linear probe alone is built"
        )


def _check_edit(edit: Edit) -> None:
    """Refuse an edit that vLLM's graph cannot express."""
    if edit.operator not in ("add", "fill"):
        raise InputError(f"the operator `{edit.operator}` is not built in vLLM")
    if edit.preserve_norm:
        raise InputError(NO_NORM)
    if edit.vector.dim() > 1:
        raise InputError("vectors of their own for each request are not built in vLLM")


def targets_of(parts: Sequence[Intervention]) -> torch.Tensor | None:
    """float32 [rows, layers of fill]: the coordinates that `fill` raises each row to, in ascending
    order of the layers; [1, layers] where all rows have the same. None without `fill`."""
    fills = {
        edit.layer: edit.target for part in parts for edit in part.edits if edit.target is not None
    }
    if not fills:
        return None
    columns = [target.float().reshape(-1) for _, target in sorted(fills.items())]
    return torch.stack([column.expand(max(map(len, columns))) for column in columns], dim=1)


@dataclass
class Step:
    """What is done to a batch of tokens at one decoder layer."""

    add: torch.Tensor | None
    """[d] in the model's dtype."""
    fill: torch.Tensor | None
    """float32 [d], unit length."""
    column: int
    """Of the board's targets, for `fill`."""
    strength: float
    """Of `fill`."""
    read: torch.Tensor | None
    """float32 [d]: what the gate's score gains at this layer is h . read."""
    decides: bool
    """Whether the gate's last layer is this one."""
    threshold: float
    """The gate opens where its score is above it."""
    kept: int | None = None
    """The layer, where its state at the board's `places` is kept."""

    def __call__(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, board: Board
    ) -> torch.Tensor:
        """The layer's hidden output [T, d], edited; `residual` [T, d] completes the state."""
        if board.idle:
            return hidden
        n = hidden.shape[0]
        if self.read is not None or self.fill is not None or self.kept is not None:
            state = (hidden if residual is None else hidden + residual).float()
            if self.kept is not None:
                board.kept[self.kept] = state[board.places]
            if self.read is not None:
                board.score[:n] += (state @ self.read)[:, None]
                if self.decides:
                    board.decide(n, self.threshold)
            if self.fill is not None:
                coordinate = state @ self.fill
                board.seen[:n, self.column] = coordinate
                missing = board.target[:n, self.column] - coordinate
                raised = self.strength * torch.relu(missing)[:, None] * self.fill
                hidden = hidden + (board.mask[:n] * board.open[:n] * raised).to(hidden.dtype)
        if self.add is not None:
            hidden = hidden + (board.mask[:n] * board.open[:n]).to(hidden.dtype) * self.add
        return hidden
