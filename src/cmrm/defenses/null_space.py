"""Null-space projection: our reading of TBOP (Han et al., arXiv 2603.14825)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cmrm.defenses.anchors import anchor_states
from cmrm.defenses.base import Defense, FitData, typed
from cmrm.defenses.space import LayerRange, Space, Whole
from cmrm.engines.base import Engine
from cmrm.errors import ArtifactError, InputError
from cmrm.prompts.conditions import Condition, Request
from cmrm.steering.intervention import Edit, Intervention
from cmrm.steering.setting import Positions, Steering


class NullSpace(Defense):
    """Projects states onto the null space of the shift of a blank image:  h <- h - U'U h.

    U [k, d] are the first k right singular vectors of the differences h_blank - h_text of the
    anchors, uncentred, at the last prompt token.

    Our reading of "Two Birds, One Projection": the abstract and two secondary accounts were read.
    They say a subspace by SVD of the blank image's shift, projected out of the last token at one
    late layer, in one pass. None gives rank and layer: rank 4 and the layer at 80 % of the depth
    are ours. No claim is made on the paper's figures.
    """

    name = "null_space"
    source = "our reading of TBOP, arXiv 2603.14825"
    needs_fit = True
    fits_on_images = True

    def __init__(
        self,
        *,
        rank: int = 4,
        layers: Sequence[int] | None = None,
        positions: Positions = "last_prompt",
    ) -> None:
        """`rank`: dimensions that are projected out, >= 1; `layers`: 0-based, None: one at 80 % of
        the depth; `positions` as in `steering.setting`."""
        super().__init__()
        typed("rank", rank, int, "a whole number, 1 or above")
        if rank < 1:
            raise InputError(f"rank is {rank}; it is a whole number, 1 or above")
        self.rank = rank
        self.steering = Steering(
            layers=None if layers is None else tuple(layers), positions=positions
        )

    def check(self, engine: Engine) -> None:
        """Raise `InputError` where a layer is none of the model's, or the rank is its width."""
        self._layers(engine)
        if self.rank >= engine.hidden_size:
            raise InputError(
                f"rank is {self.rank}; this model's states have {engine.hidden_size} dimensions, "
                "and nothing would be left"
            )

    def _layers(self, engine: Engine) -> tuple[int, ...]:
        if self.steering.layers is None:
            return (round(0.8 * (engine.n_layers - 1)),)
        return self.steering.chosen_layers(engine.n_layers)

    @property
    def settings(self) -> dict[str, Any]:
        """Rank, layers and positions."""
        values = self.steering.to_json()
        return {"rank": self.rank, "layers": values["layers"], "positions": values["positions"]}

    def space(self, engine: Engine) -> Space:
        """Rank, up to 8, and layers."""
        rank = Whole("rank", 1, max(1, min(8, engine.hidden_size - 1)))
        return (rank, LayerRange(engine.n_layers - 1))

    @property
    def fitted_by(self) -> tuple[object, ...]:
        """Rank and layers."""
        return (self.rank, self.steering.layers)

    def fit(self, engine: Engine, data: FitData) -> None:
        """The subspace of each chosen layer: `basis`, float32 [layers, rank, d], orthonormal rows.

        Raises:
            InputError: there are fewer anchors than dimensions to project out.
        """
        layers, size = self._layers(engine), data.batch_size
        if len(data.shifted) < self.rank:
            raise InputError(
                f"{len(data.shifted)} anchors span no {self.rank} dimensions; give more anchors, "
                "or lower rank"
            )
        blank = anchor_states(engine, data.shifted, Condition.BLANK, size, layers)
        text = anchor_states(engine, data.shifted, Condition.QUERY, size, layers)
        differences = (blank - text).double().transpose(0, 1)
        basis = torch.linalg.svd(differences, full_matrices=False).Vh[:, : self.rank]
        self.state = {"basis": basis.float().contiguous()}

    def load(self, path: Path, engine: Engine) -> None:
        """Read what `save` wrote. A file of an older cmrm holds one direction a layer, the unit
        mean shift, which is read as a subspace of rank 1.

        Raises:
            ArtifactError: as `Defense.load`, or the file was fitted for other layers or another
                rank.
        """
        super().load(path, engine)
        layers = self._layers(engine)
        old = self.state.get("modality")
        if old is not None:
            self.state = {"basis": old[list(layers)][:, None].contiguous()}
        shape = tuple(self.state["basis"].shape)
        if shape != (len(layers), self.rank, engine.hidden_size):
            self.state = {}
            raise ArtifactError(
                f"{path} holds a subspace of rank {shape[1]} for {shape[0]} layers, the setting "
                f"asks for rank {self.rank} and {len(layers)}; set the same, or fit null_space "
                "again"
            )

    def intervene(
        self, engine: Engine, requests: Sequence[Request], keys: Sequence[str]
    ) -> list[Intervention]:
        """The projection, in rows with an image."""
        basis = self.fitted("basis")
        edits = tuple(
            Edit(layer, vector, "project")
            for layer, vectors in zip(self._layers(engine), basis, strict=True)
            for vector in vectors
        )
        return [Intervention(edits, self.steering.positions)]
