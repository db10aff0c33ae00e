"""An intervention in the residual stream as data: per-layer edits, positions, strength.

Engines apply it; hooks on a transformers model (`steering.hooks`) are one of them. Nothing here
runs a model.

| operator | what happens behind decoder block l, at the chosen positions of rows with an image |
|---|---|
| `add` | h <- h + strength v |
| `fill` | h <- h + strength relu(target - h . v) v, v of unit length: never lowered |
| `project` | h <- h - strength (h . v) v, with v of unit length |
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch

from cmrm.errors import InputError
from cmrm.steering.setting import Positions, Steering

Operator = Literal["add", "fill", "project"]


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
        tensors = [self.vector] if self.target is None else [self.vector, self.target]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            raise InputError(
                f"the vector of decoder layer {self.layer} holds NaN or infinity; extract the "
                "vectors again"
            )
        if (self.operator == "fill") != (self.target is not None):
            raise InputError("`fill` takes a target, the other operators none")
        if self.preserve_norm and self.operator != "add":
            raise InputError("preserve_norm goes with the operator `add` alone")

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

    def __post_init__(self) -> None:
        if self.positions not in get_args(Positions):
            raise InputError(
                f"positions is {self.positions!r}; one of {', '.join(get_args(Positions))}"
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
            for tensor in (edit.vector, edit.target):
                if tensor is not None:
                    plain = tensor.detach().float().cpu().contiguous()
                    digest.update(f"\x00{tuple(plain.shape)}".encode() + plain.numpy().tobytes())
        return digest.hexdigest()

    def select(self, rows: Sequence[int]) -> Intervention:
        """The same intervention for some rows of a batch, in the order given."""
        return Intervention(tuple(edit.select(rows) for edit in self.edits), self.positions)

    def check(self, n_layers: int, hidden_size: int) -> None:
        """Refuse a model of another shape.

        Raises:
            InputError: a layer is out of range, or a vector has another width.
        """
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


def shift_intervention(vectors: torch.Tensor, steering: Steering) -> Intervention:
    """Shift vectors under a setting: h <- h + alpha * delta_l at each chosen layer.

    Args:
        vectors: float [L, d] for all rows, or [R, L, d] with one set for each row.
        steering: schedule, strength, positions, layers.

    Raises:
        InputError: the vectors have another number of dimensions or hold NaN, or a layer is out of
            range.
    """
    if vectors.dim() not in (2, 3):
        raise InputError(
            f"vectors are {tuple(vectors.shape)}; expected [layers, width], or one such set a row"
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
    return Intervention(tuple(edits), steering.positions)
