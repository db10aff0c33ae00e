"""Add shift vectors to the residual stream while a model runs: hooks under a context manager, reversible, gated by image.

After decoder block l:  h <- h + alpha * delta_l  at the chosen positions of rows that contain an image.

| schedule | delta_l | total displacement at layer l, to first order |
|---|---|---|
| `telescoped` | v_l - v_(previous chosen layer), first one v_l | v_l |
| `per_layer` | v_l, the paper's letter | sum of all v up to l: the residual stream carries each on |

| positions | steered |
|---|---|
| `last` | the last prompt token and every generated token |
| `all` | every position, prompt and generated |
| `after_image` | every position after the row's last image token of the prompt, and every generated token |
| `generated` | generated tokens alone |
| `last_prompt` | the last prompt token alone |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from cmrm.shift.artifact import Recommended, ShiftVectors
from cmrm.shift.capture import hidden_of
from cmrm.model.compat import cache_given
from cmrm.errors import InputError, SteeringError
from cmrm.model.vlm import VLM

Schedule = Literal["telescoped", "per_layer"]
Positions = Literal["last", "all", "after_image", "generated", "last_prompt"]


@dataclass(frozen=True)
class Steering:
    """How vectors are applied."""

    alpha: float = 1.0
    """Strength, >= 0; 0 leaves the model as it is, bit for bit."""
    schedule: Schedule = "telescoped"
    """See the module's table."""
    positions: Positions = "last"
    """See the module's table."""
    layers: tuple[int, ...] | None = None
    """0-based decoder layers that are steered; None: all."""
    preserve_norm: bool = False
    """Rescale each steered state to the norm that it had before."""

    def __post_init__(self) -> None:
        if not isinstance(self.alpha, int | float) or not 0.0 <= self.alpha < float("inf"):
            raise InputError(
                f"alpha is {self.alpha}; it is a finite number >= 0 (cmrm restores refusals, never removes)"
            )
        if self.schedule not in get_args(Schedule):
            raise InputError(f"schedule is {self.schedule!r}; one of {', '.join(get_args(Schedule))}")
        if self.positions not in get_args(Positions):
            raise InputError(f"positions is {self.positions!r}; one of {', '.join(get_args(Positions))}")
        if self.layers is not None and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise InputError(
                f"layers is {self.layers}; name each 0-based decoder layer once, at least one, or None for all"
            )

    @classmethod
    def from_recommended(cls, recommended: Recommended) -> Steering:
        """The setting that an artifact recommends."""
        return cls(
            alpha=recommended.alpha,
            schedule=recommended.schedule,  # type: ignore[arg-type]
            positions=recommended.positions,  # type: ignore[arg-type]
            layers=recommended.layers,
            preserve_norm=recommended.preserve_norm,
        )

    def chosen_layers(self, n_layers: int) -> tuple[int, ...]:
        """Sorted layers to steer in a model of `n_layers`; `InputError` when one is out of range."""
        chosen = tuple(range(n_layers)) if self.layers is None else tuple(sorted(self.layers))
        wrong = [layer for layer in chosen if not 0 <= layer < n_layers]
        if wrong:
            raise InputError(f"layers {wrong} are out of range: this model's decoder layers are 0..{n_layers - 1}")
        return chosen


PRESETS = {"calibrated": Steering(), "paper": Steering(schedule="per_layer", positions="all")}
"""`paper`: the paper's letter. `calibrated`: the default, which keeps a small model intact."""


def layer_deltas(vectors: torch.Tensor, steering: Steering) -> dict[int, torch.Tensor]:
    """What is added after each chosen layer, alpha included: layer -> [..., d], from vectors [..., L, d]."""
    deltas: dict[int, torch.Tensor] = {}
    previous = torch.zeros_like(vectors[..., 0, :])
    for layer in steering.chosen_layers(vectors.shape[-2]):
        here = vectors[..., layer, :]
        deltas[layer] = steering.alpha * (here - previous if steering.schedule == "telescoped" else here)
        if steering.schedule == "telescoped":
            previous = here
    return deltas


@contextmanager
def steer(
    vlm: VLM,
    shift: ShiftVectors | torch.Tensor,
    steering: Steering | None = None,
    *,
    alpha: float | None = None,
    has_image: Sequence[bool] | torch.Tensor | None = None,
) -> Iterator[None]:
    """Steer every forward pass of `vlm.model` inside the block.

    Args:
        vlm: the model.
        shift: an artifact (its match with the model is checked), or raw vectors: float [L, d] for all rows, or
            [B, L, d] with one set a row, for the sample level.
        steering: setting; an artifact's recommended one, or the `calibrated` preset, when None.
        alpha: overrides the setting's strength.
        has_image: which rows contain an image. None: read from each prompt's `input_ids`, which is right unless the
            model is called with `inputs_embeds`.

    Raises:
        ArtifactError: the artifact belongs to another model.
        InputError: alpha < 0, a layer out of range, vectors of another shape or with NaN.
        SteeringError: on exit, when a chosen layer never ran (a no-op would look like a null result); inside, when rows
            do not fit or the prompt cannot be seen.
    """
    if isinstance(shift, ShiftVectors):
        shift.check(vlm)
        vectors = shift.vectors
        steering = steering or Steering.from_recommended(shift.recommended)
    else:
        vectors = shift
        steering = steering or Steering()
    if alpha is not None:
        steering = replace(steering, alpha=alpha)
    if vectors.dim() not in {2, 3} or tuple(vectors.shape[-2:]) != (vlm.n_layers, vlm.hidden_size):
        raise InputError(
            f"vectors are {tuple(vectors.shape)}; this model takes [{vlm.n_layers}, {vlm.hidden_size}], "
            f"or one such set a row"
        )
    if not torch.isfinite(vectors).all():
        raise InputError("vectors hold NaN or infinity; extract them anew")
    edits = {layer: _adder(delta, steering) for layer, delta in layer_deltas(vectors.float(), steering).items()}
    with edit_states(vlm, edits, steering.positions, has_image=has_image):
        yield


Edit = Callable[[torch.Tensor, "Rows"], torch.Tensor]
"""The output of a decoder block, [B, T, d], to what takes its place; `Rows.factor` says which positions are meant."""


@contextmanager
def edit_states(
    vlm: VLM,
    edits: Mapping[int, Edit],
    positions: Positions,
    *,
    has_image: Sequence[bool] | torch.Tensor | None = None,
) -> Iterator[None]:
    """Put `edits[l]` behind decoder block l in every forward pass inside the block; `steer` and other defences use it.

    Raises:
        SteeringError: on exit, when an edited layer never ran; inside, when rows do not fit or the prompt cannot be seen.
    """
    state = Rows(vlm.image_token_id, positions, has_image)
    fired: set[int] = set()
    handles = [vlm.model.register_forward_pre_hook(state.see, with_kwargs=True)]
    try:
        for layer, edit in edits.items():
            handles.append(vlm.layers[layer].register_forward_hook(_hook(layer, edit, state, fired)))
        yield
    finally:
        for handle in handles:
            handle.remove()
    silent = sorted(set(edits) - fired - (vlm.skippable if fired else set()))
    if silent:
        raise SteeringError(f"steering never reached decoder layers {silent}: no forward pass of this model ran there")


class Rows:
    """Which positions of the pass at hand are steered, worked out once per forward pass of the whole model."""

    def __init__(self, image_token_id: int, positions: str, has_image: Sequence[bool] | torch.Tensor | None) -> None:
        self.image_token_id = image_token_id
        self.positions = positions
        self.given = None if has_image is None else torch.as_tensor(has_image, dtype=torch.bool)
        self.gate: torch.Tensor | None = None
        self.prompt: torch.Tensor | None = None
        self.decoding = False
        self.mask: torch.Tensor | None = None
        self.shape: tuple[int, ...] = ()
        self._factors: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def factor(self, like: torch.Tensor) -> torch.Tensor:
        """1 where a position is steered and 0 elsewhere, [B, T, 1] in the dtype and place of `like`; made once per pass."""
        key = (like.device, like.dtype)
        if key not in self._factors:
            assert self.mask is not None
            self._factors[key] = self.mask[..., None].to(like.device, like.dtype)
        return self._factors[key]

    def _set(self, mask: torch.Tensor) -> None:
        self.mask, self.shape = mask, tuple(mask.shape)
        self._factors = {}

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model runs: set `mask`, bool [B, T], from the tokens that it is about to read."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        embeds = kwargs.get("inputs_embeds")
        cache = cache_given(kwargs)
        fresh = cache is None or cache.get_seq_length() == 0
        if ids is None and embeds is None:
            raise SteeringError(
                "the model was called without input_ids and inputs_embeds; steering cannot see the prompt"
            )
        tokens = ids if ids is not None else embeds
        assert tokens is not None
        shape, device = tuple(tokens.shape[:2]), tokens.device
        if not fresh and shape[1] == 1 and self.gate is not None and self.gate.shape[0] == shape[0]:
            # A generated token, be it an image token's id, opens no gate; the next one finds all of this made.
            if self.decoding and self.shape == shape:
                return
            self.decoding = True
            gate = self.gate.to(device)[:, None]
            self._set(torch.zeros_like(gate) if self.positions == "last_prompt" else gate)
            return
        self.decoding = False
        mask = kwargs.get("attention_mask")
        if fresh and isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] > shape[1]:
            raise SteeringError(
                f"the attention mask covers {mask.shape[1]} tokens, the model was given {shape[1]} and no key-value cache that "
                "cmrm sees; generated tokens could not be told from the prompt. Is this version of transformers newer than cmrm?"
            )
        if fresh and self.positions in {"last", "generated", "last_prompt"}:
            self._refuse_recomputation(ids)
        is_image = (
            ids == self.image_token_id if ids is not None else torch.zeros(shape, dtype=torch.bool, device=device)
        )
        if self.given is not None:
            gate = self.given.to(device)
        elif ids is None and fresh:
            raise SteeringError(
                "the model was called with inputs_embeds alone; tell steer(has_image=...) which rows to steer"
            )
        elif fresh or self.gate is None:
            gate = is_image.any(dim=1)
        else:
            gate = self.gate.to(device) | is_image.any(dim=1)
        if gate.shape[0] != shape[0]:
            raise SteeringError(f"{shape[0]} rows were run, but {gate.shape[0]} are known; start a new steer() block")
        self.gate = gate
        self._set(self._positions(shape, is_image, kwargs.get("attention_mask"), fresh, device) & gate[:, None])

    def _refuse_recomputation(self, ids: Any) -> None:
        """Without a KV cache every step looks like a new prompt, and what was generated before would go unsteered."""
        before, self.prompt = self.prompt, ids
        if before is None or ids is None or ids.shape != (before.shape[0], before.shape[1] + 1):
            return
        if torch.equal(ids[:, :-1], before):
            raise SteeringError(
                f"positions {self.positions!r} need the KV cache to tell generated tokens from the prompt; generate with "
                "use_cache=True, or steer positions 'all'"
            )

    def _positions(
        self, shape: tuple[int, ...], is_image: torch.Tensor, attention_mask: Any, fresh: bool, device: torch.device
    ) -> torch.Tensor:
        rows, width = shape
        generated = not fresh and width == 1
        everywhere = torch.ones(rows, width, dtype=torch.bool, device=device)
        if generated and self.positions == "last_prompt":
            chosen = ~everywhere
        elif generated or self.positions == "all":
            chosen = everywhere
        elif self.positions == "generated":
            chosen = ~everywhere
        elif self.positions == "after_image":
            places = torch.arange(width, device=device)
            last_image = torch.where(is_image, places, -1).amax(dim=1, keepdim=True)
            chosen = places[None, :] > last_image
        else:
            chosen = torch.zeros(rows, width, dtype=torch.bool, device=device)
            chosen[torch.arange(rows, device=device), self._last(attention_mask, width, rows, device)] = True
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2 and attention_mask.shape[1] >= width:
            chosen = chosen & attention_mask[:, -width:].bool().to(device)
        return chosen

    @staticmethod
    def _last(attention_mask: Any, width: int, rows: int, device: torch.device) -> torch.Tensor:
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2 and attention_mask.shape[1] >= width:
            return (width - 1 - attention_mask[:, -width:].flip(1).argmax(dim=1)).to(device)
        return torch.full((rows,), width - 1, device=device)


def _hook(layer: int, edit: Edit, state: Rows, fired: set[int]) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output if type(output) is torch.Tensor and output.dim() == 3 else hidden_of(output)
        fired.add(layer)
        if state.shape != hidden.shape[:2]:
            raise SteeringError(
                f"decoder layer {layer} ran on {tuple(hidden.shape[:2])} positions that the model's own call did not "
                "announce; call the whole model, not a part of it, inside steer()"
            )
        edited = edit(hidden, state)
        return edited if hidden is output else (edited, *output[1:])

    return hook


def _adder(delta: torch.Tensor, steering: Steering) -> Edit:
    placed: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}
    held: torch.Tensor | None = None
    held_for: torch.Tensor | None = None

    def edit(hidden: torch.Tensor, state: Rows) -> torch.Tensor:
        nonlocal held, held_for
        if steering.alpha == 0:
            return hidden
        if held is not None and held_for is state.mask:  # decoding: what is added is the same from token to token
            return hidden + held
        key = (hidden.device, hidden.dtype)
        if key not in placed:
            placed[key] = delta.to(hidden.device, hidden.dtype)
        addend = placed[key]
        if addend.dim() == 2:
            addend = _per_row(addend, hidden.shape[0])[:, None, :]
        if not steering.preserve_norm:
            if not state.decoding:
                held = held_for = None
                return torch.addcmul(hidden, state.factor(hidden), addend)
            held, held_for = state.factor(hidden) * addend, state.mask
            return hidden + held
        moved = hidden + addend
        before = hidden.float().norm(dim=-1, keepdim=True)
        after = moved.float().norm(dim=-1, keepdim=True).clamp_min(1e-12)
        moved = (moved.float() * (before / after)).to(hidden.dtype)
        assert state.mask is not None
        return torch.where(state.mask.to(hidden.device)[..., None], moved, hidden)

    return edit


def _per_row(addend: torch.Tensor, rows: int) -> torch.Tensor:
    """One vector a row; a search that keeps several candidates a prompt repeats each prompt's vector."""
    if rows % addend.shape[0]:
        raise SteeringError(f"vectors for {addend.shape[0]} rows were given, the model runs {rows}")
    return addend.repeat_interleave(rows // addend.shape[0], dim=0)
