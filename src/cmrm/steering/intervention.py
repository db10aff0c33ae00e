"""An intervention in the residual stream as data: per-layer edits, positions, strength.

Engines apply it; hooks on a transformers model (`steering.hooks`) are one of them. Nothing here
runs a model.

| operator | what happens behind decoder block l, at the chosen positions of rows with an image |
|---|---|
| `add` | h <- h + strength v |
| `fill` | h <- h + strength relu(target - h . v) v, v of unit length: never lowered |
| `project` | h <- h - strength (h . v) v, with v of unit length |
| `oppose` | h <- h + strength norm(h) relu(-cos(h - origin, v)) v, v of unit length |
| `affine` | h <- h + strength (M h + v), with a matrix M |

An intervention may have a gate (`steering.gate`): rows that it leaves closed are not touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch

from cmrm.errors import InputError
from cmrm.steering.gate import Gate
from cmrm.steering.setting import Positions, Steering

Operator = Literal["add", "fill", "project", "oppose", "affine"]
GATED_POSITIONS: tuple[Positions, ...] = ("last", "last_prompt", "generated")
"""Positions that stand at or behind the token where a gate decides."""


@dataclass(frozen=True, eq=False)
class Edit:
    """What is done to the output of one decoder block."""

    layer: int
    """0-based decoder layer."""
    vector: torch.Tensor
    """float32 [d] for all rows, or [R, d] with one for each row."""
    operator: Operator = "add"
    """See the module's table."""
    strength: float = 1.0
    """Factor, >= 0."""
    target: torch.Tensor | None = None
    """float32 [] or [R]: the coordinate along `vector` that `fill` raises a state to."""
    preserve_norm: bool = False
    """Rescale each edited state to the norm that it had before (`add` alone)."""
    origin: torch.Tensor | None = None
    """float32 [d]: what `oppose` measures states from."""
    matrix: torch.Tensor | None = None
    """float32 [d, d]: M of `affine`."""

    def __post_init__(self) -> None:
        if self.operator not in get_args(Operator):
            raise InputError(
                f"operator is {self.operator!r}; one of {', '.join(get_args(Operator))}"
            )
        if not 0.0 <= self.strength < float("inf"):
            raise InputError(f"strength is {self.strength}; it is a finite number >= 0")
        if self.vector.dim() not in (1, 2) or not self.vector.is_floating_point():
            raise InputError(
                f"an edit's vector is {tuple(self.vector.shape)}; expected [d] or [rows, d]"
            )
        if not all(bool(torch.isfinite(tensor).all()) for tensor in self.tensors):
            raise InputError(
                f"the vector of decoder layer {self.layer} holds NaN or infinity; extract the "
                "vectors again"
            )
        operands = {"fill": self.target, "oppose": self.origin, "affine": self.matrix}
        for operator, tensor in operands.items():
            if (self.operator == operator) != (tensor is not None):
                name = {"fill": "target", "oppose": "origin", "affine": "matrix"}[operator]
                raise InputError(f"`{operator}` takes a {name}, the other operators none")
        width = self.vector.shape[-1]
        wrong = (self.origin is not None and tuple(self.origin.shape) != (width,)) or (
            self.matrix is not None and tuple(self.matrix.shape) != (width, width)
        )
        if wrong:
            raise InputError(
                f"the edit's vector is {width} wide; an origin is [{width}], a matrix "
                f"[{width}, {width}]"
            )
        if self.preserve_norm and self.operator != "add":
            raise InputError("preserve_norm goes with the operator `add` alone")

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Every tensor that the edit holds."""
        tensors = (self.vector, self.target, self.origin, self.matrix)
        return tuple(tensor for tensor in tensors if tensor is not None)

    def select(self, rows: Sequence[int]) -> Edit:
        """The same edit for some rows of a batch."""
        if self.vector.dim() == 1 and (self.target is None or self.target.dim() == 0):
            return self
        places = torch.as_tensor(rows, dtype=torch.long)
        vector = self.vector[places] if self.vector.dim() == 2 else self.vector
        target = self.target
        if target is not None and target.dim() == 1:
            target = target[places]
        return replace(self, vector=vector, target=target)


@dataclass(frozen=True, eq=False)
class Intervention:
    """Edits that belong together, and the tokens at which they are made."""

    edits: tuple[Edit, ...]
    """In the order in which they are made; several may be of one layer."""
    positions: Positions = "last"
    """Which tokens; see `steering.setting`."""
    gate: Gate | None = None
    """Which rows with an image; None: all of them."""

    def __post_init__(self) -> None:
        if self.positions not in get_args(Positions):
            raise InputError(
                f"positions is {self.positions!r}; one of {', '.join(get_args(Positions))}"
            )
        if self.gate is None:
            return
        if self.positions not in GATED_POSITIONS:
            raise InputError(
                f"a gate decides at the last prompt token, and positions is {self.positions!r}: "
                f"earlier tokens would be run before. Choose {', '.join(GATED_POSITIONS)}"
            )
        read = self.gate.layers[-1]
        below = sorted({edit.layer for edit in self.edits if edit.layer <= read})
        if below:
            raise InputError(
                f"the gate reads decoder layer {read}, and layers {below[:5]} do not stand above "
                f"it; steer layers from {read + 1} on"
            )

    @property
    def rows(self) -> int | None:
        """Rows that it has vectors for; None where one vector serves all rows."""
        sizes = {edit.vector.shape[0] for edit in self.edits if edit.vector.dim() == 2}
        sizes |= {
            len(edit.target)
            for edit in self.edits
            if edit.target is not None and edit.target.dim() == 1
        }
        if len(sizes) > 1:
            raise InputError(f"edits of one intervention have vectors for {sorted(sizes)} rows")
        return sizes.pop() if sizes else None

    @cached_property
    def key(self) -> str:
        """Hex sha256 of everything: equal for interventions that do the same."""
        digest = hashlib.sha256(self.positions.encode())
        for edit in self.edits:
            digest.update(
                f"\x00{edit.layer} {edit.operator} {edit.strength!r} {edit.preserve_norm}".encode()
            )
            for tensor in edit.tensors:
                plain = tensor.detach().float().cpu().contiguous()
                digest.update(f"\x00{tuple(plain.shape)}".encode() + plain.numpy().tobytes())
        if self.gate is not None:
            digest.update(f"\x00gate {self.gate.key}".encode())
        return digest.hexdigest()

    def select(self, rows: Sequence[int]) -> Intervention:
        """The same intervention for some rows of a batch, in the order given."""
        return replace(self, edits=tuple(edit.select(rows) for edit in self.edits))

    def check(self, n_layers: int, hidden_size: int) -> None:
        """Refuse a model of another shape.

        Raises:
            InputError: a layer is out of range, or a vector has another width.
        """
        if self.gate is not None and self.gate.vectors.shape[1] != hidden_size:
            raise InputError(
                f"the gate's vectors are {self.gate.vectors.shape[1]} wide; this model's residual "
                f"stream is {hidden_size}"
            )
        for edit in self.edits:
            if not 0 <= edit.layer < n_layers:
                raise InputError(
                    f"layer {edit.layer} is out of range: this model's decoder layers are "
                    f"0..{n_layers - 1}"
                )
            if edit.vector.shape[-1] != hidden_size:
                raise InputError(
                    f"vectors are {edit.vector.shape[-1]} wide; this model's residual stream is "
                    f"{hidden_size}"
                )


def in_dtype(vector: torch.Tensor, layer: int, dtype: torch.dtype) -> torch.Tensor:
    """A float32 vector of a decoder layer in a model's dtype.

    Raises:
        InputError: the dtype does not hold it; infinity would make every row NaN, unsteered ones
            too.
    """
    placed = vector.to(dtype)
    if not bool(torch.isfinite(placed).all()):
        raise InputError(
            f"the vector of decoder layer {layer} reaches {float(vector.abs().max()):.3g}, more "
            f"than {str(dtype).removeprefix('torch.')} holds; load the model in bfloat16 or "
            "float32, or lower alpha"
        )
    return placed


def shift_intervention(
    vectors: torch.Tensor, steering: Steering, gate: Gate | None = None
) -> Intervention:
    """Shift vectors under a setting: h <- h + alpha * delta_l at each chosen layer.

    Args:
        vectors: float [L, d] for all rows, or [R, L, d] with one set for each row. Under the
            schedule `sequential` row l is delta_l itself (`shift.sequential`).
        steering: schedule, strength, positions, layers.
        gate: decides which rows with an image are steered; it stands below the chosen layers.

    Raises:
        InputError: the vectors have another number of dimensions or hold NaN, a layer is out of
            range, the setting's operator is not `add`, it has a gate and none was given, or it is
            sequential and the vectors are one set a row.
    """
    if vectors.dim() not in (2, 3):
        raise InputError(
            f"vectors are {tuple(vectors.shape)}; expected [layers, width], or one such set a row"
        )
    if steering.operator != "add":
        raise InputError(
            f"the operator {steering.operator!r} needs an artifact with a refusal direction and "
            "the text of each request; vectors alone are added"
        )
    if steering.gate and gate is None:
        raise InputError("vectors alone have no gate; use an artifact that holds one")
    if steering.schedule == "sequential" and vectors.dim() == 3:
        raise InputError(
            "the schedule sequential is estimated over anchors; the sample level takes telescoped "
            "or per_layer"
        )
    vectors = vectors.float()
    edits = []
    previous = torch.zeros_like(vectors[..., 0, :])
    for layer in steering.chosen_layers(vectors.shape[-2]):
        vector = vectors[..., layer, :]
        delta = vector - previous if steering.schedule == "telescoped" else vector
        edits.append(
            Edit(layer, delta, strength=float(steering.alpha), preserve_norm=steering.preserve_norm)
        )
        if steering.schedule == "telescoped":
            previous = vector
    return Intervention(tuple(edits), steering.positions, gate)


def fill_intervention(
    direction: torch.Tensor,
    text_states: torch.Tensor,
    steering: Steering,
    gate: Gate | None = None,
) -> Intervention:
    """Fill along the refusal direction: h <- h + alpha relu(h_t . r - h . r) r, layer after layer.

    r is the unit vector of `direction`; h_t is what the same request has as text. The coordinate is
    raised to that of the text and never lowered, and nothing else of the state moves.

    Args:
        direction: float32 [L, d], refusal direction (`shift.direction`).
        text_states: float32 [R, L, d], each row's last-prompt-token states as text alone.
        steering: strength and layers; its positions are `last_prompt`.
        gate: decides which rows with an image are steered.

    Raises:
        InputError: a layer is out of range, or the shapes differ.
    """
    if direction.dim() != 2 or tuple(text_states.shape[1:]) != tuple(direction.shape):
        raise InputError(
            f"the refusal direction is {tuple(direction.shape)} and the text states are "
            f"{tuple(text_states.shape)}; expected [L, d] and [rows, L, d]"
        )
    unit = direction / direction.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    targets = (text_states * unit).sum(-1)
    edits = tuple(
        Edit(layer, unit[layer], "fill", float(steering.alpha), targets[:, layer].contiguous())
        for layer in steering.chosen_layers(direction.shape[0])
    )
    return Intervention(edits, steering.positions, gate)
