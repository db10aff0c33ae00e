"""The buffers of a program: which tokens of a step are steered, and what a gate decided.

They are filled before each step and read in the graph; their addresses never change, so that
captured graphs stay valid. Nothing is copied back to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cmrm.steering.setting import Positions


@dataclass(frozen=True)
class Row:
    """One request's tokens in a step."""

    first: int
    """Position in the conversation of its first token in this step."""
    count: int
    """Tokens in this step."""
    prompt: int
    """Tokens of its prompt."""
    image_end: int | None
    """Position behind its last image token; None for a request without image."""
    slot: int
    """Where the gate's decision about it is held."""

    @property
    def decides(self) -> bool:
        """Whether the last prompt token, at which a gate decides, is among its tokens."""
        return self.first < self.prompt <= self.first + self.count


def steered_tokens(row: Row, positions: Positions) -> np.ndarray:
    """bool [count]: which of a row's tokens are steered; see the table in `steering.setting`."""
    if row.image_end is None:
        return np.zeros(row.count, dtype=bool)
    place = row.first + np.arange(row.count)
    if positions == "all":
        return np.ones(row.count, dtype=bool)
    if positions == "after_image":
        return place >= row.image_end
    if positions == "generated":
        return place >= row.prompt
    if positions == "last_prompt":
        return place == row.prompt - 1
    return place >= row.prompt - 1


def first_steered(prompt: int, image_end: int, positions: Positions) -> int:
    """Position of the first token of an image request that may be steered: what lies before it is
    the same in every program. See `Row` for `prompt` and `image_end`."""
    firsts = {"all": 0, "after_image": image_end, "generated": prompt}
    return firsts.get(positions, prompt - 1)


class Board:
    """Buffers for up to `tokens` tokens a step and `slots` requests."""

    def __init__(
        self, tokens: int, slots: int, fills: int, device: torch.device, *, gated: bool
    ) -> None:
        self.gated = gated
        self.fills = fills
        self.mask = torch.zeros(tokens, 1, device=device)
        """float32 [T, 1]: 1 where a token is steered."""
        self.open = torch.full((tokens, 1), 0.0 if gated else 1.0, device=device)
        """float32 [T, 1]: the gate's held decision about a token's request."""
        self.score = torch.zeros(tokens, 1, device=device)
        """float32 [T, 1]: the gate's score so far in this step."""
        self.slot = torch.full((tokens,), slots, dtype=torch.long, device=device)
        """int64 [T]: where the decision about a token's request is held."""
        self.written = torch.full((tokens,), slots, dtype=torch.long, device=device)
        """int64 [T]: where this token's decision is written; the last place is read by nobody."""
        self.held = torch.zeros(slots + 1, 1, device=device)
        """float32 [slots + 1, 1]: decisions by slot."""
        self.target = torch.zeros(tokens, max(1, fills), device=device)
        """float32 [T, layers of fill]: coordinates that states are raised to."""
        self.seen = torch.zeros(tokens, max(1, fills), device=device)
        """float32 [T, layers of fill]: coordinates of the last step's states, before fill."""
        self.places = torch.zeros(0, dtype=torch.long, device=device)
        """int64 [P]: tokens of this step whose states are kept."""
        self.kept: dict[int, torch.Tensor] = {}
        """Layer -> float32 [P, d]: states of the last step at `places`."""
        self.slots = slots
        self.idle = False
        """Whether nothing is steered, read or decided in this step: the layers' steps are left out.
        Never where a step may be compiled or captured, and used again for another."""
        self._used = tokens

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every buffer by its name."""
        return {name: value for name, value in vars(self).items() if torch.is_tensor(value)}

    def decide(self, n: int, threshold: float) -> None:
        """Decide at the tokens that say so, hold it, and read what is held for every token."""
        decided = (self.score[:n] > threshold).float()
        self.held.index_copy_(0, self.written[:n], decided)
        self.open[:n] = self.held.index_select(0, self.slot[:n])

    def clear(self) -> None:
        """Steer nothing: for passes that answer nobody."""
        self._clear(len(self.mask))

    def _clear(self, used: int) -> None:
        """Clear what the last step used; `used`: tokens of the coming one."""
        n, self._used = max(used, self._used), used
        self.idle = False
        self.places = self.places[:0]
        self.mask[:n].zero_()
        if self.gated:
            self.score[:n].zero_()
            self.written[:n].fill_(self.slots)
            self.slot[:n].fill_(self.slots)
        if self.fills:
            self.target[:n].zero_()

    def _there(self, values: np.ndarray) -> torch.Tensor:
        """Values on the buffers' device; from pinned memory, so that the host does not wait."""
        tensor = torch.from_numpy(values)
        device = self.mask.device
        if device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(device, non_blocking=True)

    def fill_in(
        self,
        rows: Sequence[Row],
        positions: Positions,
        targets: Sequence[torch.Tensor | None] = (),
    ) -> int:
        """Prepare a step; the rows' tokens lie one behind the other.

        Args:
            rows: requests in the order of the batch.
            positions: which tokens are steered.
            targets: coordinates [layers of fill] of each row, for `fill`.

        Returns:
            Number of tokens that are steered where a gate is open, or there is none.
        """
        total = sum(row.count for row in rows)
        self._clear(total)
        if not total:
            return 0
        mask = np.concatenate([steered_tokens(row, positions) for row in rows])
        self.mask[:total, 0] = self._there(mask.astype(np.float32))
        if self.gated:
            slot = np.repeat([row.slot for row in rows], [row.count for row in rows])
            written = np.full(total, self.slots)
            place = 0
            for row in rows:
                if row.decides:
                    written[place + row.prompt - 1 - row.first] = row.slot
                place += row.count
            self.slot[:total] = self._there(slot)
            self.written[:total] = self._there(written)
        place = 0
        for row, target in zip(rows, targets or [None] * len(rows), strict=True):
            if target is not None:
                self.target[place : place + row.count] = target
            place += row.count
        return int(mask.sum())
