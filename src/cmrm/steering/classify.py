"""Which conversation the tokens of a forward pass belong to, and where its prompt ends.

What cannot be told raises before the pass: a filled KV cache that was never seen, embeddings
without a word on their images, several tokens behind a cache outside of `generate`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch

from cmrm.errors import SteeringError
from cmrm.steering.positions import NOWHERE, Conversation, prompt_of
from cmrm.steering.setting import Positions

BY_PROMPT: frozenset[Positions] = frozenset({"last", "generated", "last_prompt"})
"""Positions that ask where the prompt ends."""


@dataclass(frozen=True, eq=False)
class Call:
    """Arguments of one forward pass."""

    ids: torch.Tensor | None
    """int64 [B, T]; None where embeddings were passed."""
    tokens: torch.Tensor
    """The ids, or embeddings [B, T, d]."""
    mask: Any
    """Attention mask, as the caller passed it."""
    cache: Any
    """KV cache, or None."""
    start: int
    """Columns that the cache holds."""
    known: Conversation | None
    """What is known of the cache."""

    @property
    def rows(self) -> int:
        """Rows B."""
        return self.tokens.shape[0]

    @property
    def width(self) -> int:
        """Columns T."""
        return self.tokens.shape[1]

    @property
    def real(self) -> torch.Tensor | None:
        """bool [B, columns]: the attention mask where it has two dimensions, or None."""
        plain = isinstance(self.mask, torch.Tensor) and self.mask.dim() == 2
        return self.mask.bool() if plain else None


@dataclass(frozen=True, eq=False)
class Demand:
    """What the open sessions want to know of a pass."""

    positions: frozenset[Positions]
    """All of their positions."""
    key: str
    """Identifies their interventions."""
    has_image: torch.Tensor | None
    """bool [rows]: what the caller says of images, or None."""

    def refuse_after_image(self, reason: str) -> None:
        """Raise `SteeringError` where the image's place is asked for and not seen."""
        if "after_image" in self.positions:
            raise SteeringError(
                f"positions 'after_image': the image's place is not seen where {reason}"
            )

    @property
    def by_prompt(self) -> str:
        """Positions that ask where the prompt ends, for messages."""
        return " and ".join(sorted(self.positions & BY_PROMPT))


@dataclass(eq=False)
class GenerateScope:
    """One call of `generate`: where its prompt ends."""

    ids: torch.Tensor | None
    """int64 [B, n]: prompt tokens of the columns from `start` on; None for embeddings."""
    start: int
    """First column of `ids`."""
    end: int
    """Number of prompt columns."""
    mask: torch.Tensor | None
    """bool [B, end]: real tokens; None: no padding."""
    conversation: Conversation | None = None
    """Bound to the first pass."""
    uncached: bool = False
    """Whether that pass had no cache: every step runs the whole sequence."""

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GenerateScope:
        """The scope of a call with these arguments of transformers' `generate`.

        Raises:
            SteeringError: the call packs conversations into one row.
        """
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        paged = kwargs.get("cache_implementation") or getattr(config, "cache_implementation", None)
        if isinstance(paged, str) and paged.startswith("paged"):
            raise SteeringError(
                "a paged cache packs conversations into one row, which cannot be steered apart"
            )
        embeds, ids = kwargs.get("inputs_embeds"), kwargs.get("input_ids")
        if ids is None:
            ids = kwargs.get("inputs", args[0] if args else None)
        mask = kwargs.get("attention_mask")
        mask = mask.bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        tokens = ids if embeds is None else embeds
        width = 1 if tokens is None else tokens.shape[1]
        # Behind a filled cache the caller may pass the new tokens alone; the mask covers them all.
        end = width if mask is None else max(width, mask.shape[1])
        if ids is not None and embeds is not None and ids.shape[1] != embeds.shape[1]:
            ids = None
        return cls(ids, end - width, end, mask)

    def runs(self, call: Call) -> bool:
        """Whether a pass runs this call's own sequence, not one of a guidance branch or a draft."""
        if self.conversation is None:
            return True
        if call.cache is not None:
            return call.known is self.conversation
        if not self.uncached or self.ids is None or call.ids is None:
            return False
        rows, times = self.ids.shape[0], call.ids.shape[0] // self.ids.shape[0]
        if call.ids.shape[1] < self.end or rows * times != call.ids.shape[0]:
            return False
        prompt = self.ids.to(call.ids.device).repeat_interleave(times, dim=0)
        return torch.equal(call.ids[:, self.start : self.end], prompt)


class Classifier:
    """Finds the conversation of each pass of one model."""

    def __init__(self, image_token_id: int) -> None:
        self.image_token_id = image_token_id
        self._uncached: dict[int, torch.Tensor] = {}

    def forget(self) -> None:
        """Drop what was seen of passes without a cache."""
        self._uncached.clear()

    def conversation(self, call: Call, demand: Demand, scope: GenerateScope | None) -> Conversation:
        """The conversation that a pass belongs to; `scope` is the innermost call of `generate`.

        Raises:
            SteeringError: it cannot be told which rows hold an image, or which tokens are prompt.
        """
        scope = scope if scope is not None and scope.runs(call) else None
        if scope is not None and scope.conversation is None:
            conversation = self._of_generate(scope, call, demand)
            scope.uncached = call.cache is None
        elif scope is not None:
            assert scope.conversation is not None
            conversation = scope.conversation
        elif call.start == 0:
            conversation = self._fresh(call, demand)
        else:
            conversation = self._continued(call, demand)
        expanded = conversation.expanded(call.rows)
        if expanded is None:
            raise SteeringError(
                f"{call.rows} rows were run, but {conversation.rows} are known of this "
                "conversation; start it again, with its whole prompt"
            )
        if scope is not None:
            scope.conversation = expanded
        if call.start > 0 and (expanded.unsteered or expanded.steered_by != demand.key):
            _refuse_unsteered(expanded, call.start, demand)
        expanded.steered_by = demand.key
        return expanded

    def _is_image(self, ids: torch.Tensor | None, call: Call, demand: Demand) -> torch.Tensor:
        """bool [B, T]: image tokens; embeddings have none that can be seen."""
        if ids is not None:
            return ids == self.image_token_id
        if demand.has_image is None:
            raise SteeringError(
                "the model is called with inputs_embeds alone; say which rows hold an image: "
                "steer(..., has_image=[...])"
            )
        demand.refuse_after_image("the model is called with inputs_embeds")
        return torch.zeros(call.tokens.shape[:2], dtype=torch.bool, device=call.tokens.device)

    def _of_generate(self, scope: GenerateScope, call: Call, demand: Demand) -> Conversation:
        """The conversation of a call of `generate`, from its whole prompt."""
        device = call.tokens.device
        before = call.known if call.known is not None and call.known.length == call.start else None
        if scope.start > 0 and before is None and demand.has_image is None:
            raise _unknown_cache()
        if scope.ids is None:
            is_image = self._is_image(None, call, demand)
            start = scope.end - is_image.shape[1]
        else:
            is_image, start = scope.ids.to(device) == self.image_token_id, scope.start
        conversation = prompt_of(
            is_image,
            None if scope.mask is None else scope.mask.to(device),
            start=start,
            end=scope.end,
            before=None if start == 0 or before is None else before.expanded(is_image.shape[0]),
        )
        if before is not None and start == 0:
            conversation.unsteered, conversation.steered_by = before.unsteered, before.steered_by
        if call.start > 0 and before is None:
            conversation.unsteered = True
        return _gated(conversation, demand.has_image)

    def _fresh(self, call: Call, demand: Demand) -> Conversation:
        """A conversation that begins with this pass, which is its whole prompt."""
        is_image = self._is_image(call.ids, call, demand)
        real = call.real
        if real is not None and real.shape[1] > call.width:
            raise SteeringError(
                f"the attention mask covers {real.shape[1]} tokens, the model was given "
                f"{call.width} and no KV cache that cmrm sees; generated tokens cannot be told "
                "from the prompt"
            )
        hidden_padding = call.mask is not None and real is None and call.rows > 1
        if hidden_padding and demand.positions & {"last", "last_prompt"}:
            raise SteeringError(
                "the attention mask is not [rows, tokens]; padding cannot be told from the last "
                "prompt token. Pass a mask of two dimensions, or steer positions 'all'"
            )
        conversation = prompt_of(is_image, real, start=0, end=call.width)
        if call.ids is not None and demand.positions & BY_PROMPT:
            gated = bool(conversation.gate.any()) or demand.has_image is not None
            self._refuse_recomputation(call.ids, gated, demand)
        return _gated(conversation, demand.has_image)

    def _refuse_recomputation(self, ids: torch.Tensor, gated: bool, demand: Demand) -> None:
        """Without a cache every step looks like a new prompt; generated tokens would be missed."""
        thread = threading.get_ident()
        before = self._uncached.get(thread)
        self._uncached[thread] = ids
        if before is None or not gated or ids.shape != (before.shape[0], before.shape[1] + 1):
            return
        if torch.equal(ids[:, :-1], before.to(ids.device)):
            raise SteeringError(
                f"positions {demand.by_prompt!r}: this pass repeats the prompt before it and adds "
                "to it, without a KV cache; generated tokens cannot be told from the prompt. Use "
                "the KV cache or model.generate"
            )

    def _continued(self, call: Call, demand: Demand) -> Conversation:
        """A conversation behind a filled cache, outside of `generate`."""
        known, start, width = call.known, call.start, call.width
        if known is not None and known.length < start:  # tokens were added that nobody here saw
            if demand.has_image is None and not bool(known.gate.all()):
                raise _unknown_cache()
            known.unsteered = True
            known = None if demand.has_image is not None else known
        if known is None and demand.has_image is None:
            raise _unknown_cache()
        if known is not None and start < known.length:
            known = _cropped(known, start)
        seen = known is not None and known.length == start
        if known is not None and (start + width <= known.prompt_end or (width == 1 and seen)):
            return known
        if seen and demand.positions & BY_PROMPT:
            raise SteeringError(
                f"positions {demand.by_prompt!r}: {width} tokens were run behind {start} in one "
                "pass; they may be a new turn, a part of the prompt or generated candidates. Call "
                "model.generate, which tells, or steer positions 'all'"
            )
        end = start if width == 1 else start + width
        is_image = self._is_image(call.ids, call, demand)[:, : end - start]
        real = call.real
        conversation = prompt_of(
            is_image,
            real if real is not None and real.shape[1] == end else None,
            start=start,
            end=end,
            before=None if known is None else known.expanded(call.rows),
        )
        conversation.unsteered |= not seen
        return _gated(conversation, demand.has_image)


def _cropped(known: Conversation, start: int) -> Conversation:
    """The conversation after its cache was cut to `start` columns.

    What gates decided holds in rows whose last prompt token is left.
    """
    first = torch.where(known.first_image < start, known.first_image, NOWHERE)
    gate = known.gate & (first != NOWHERE) if known.images_seen else known.gate
    last_image = known.last_image.clamp(max=start - 1)
    left = (known.last_prompt < start).cpu()
    decided = {key: rows & left for key, rows in known.decided.items()} if left.any() else {}
    return known.changed(
        length=start,
        gate=gate,
        last_image=last_image,
        first_image=first,
        decided=decided,
        decisions={key: known.decisions[key] & rows for key, rows in decided.items()},
    )


def _gated(conversation: Conversation, has_image: torch.Tensor | None) -> Conversation:
    """The conversation with the rows that the caller says hold an image."""
    if has_image is None:
        return conversation
    rows, named = conversation.rows, len(has_image)
    if rows % named:
        raise SteeringError(f"has_image names {named} rows, the model was run on {rows}")
    gate = has_image.repeat_interleave(rows // named).to(conversation.gate.device)
    return conversation.changed(gate=gate, images_seen=False)


def _refuse_unsteered(conversation: Conversation, start: int, demand: Demand) -> None:
    """Refuse to continue behind tokens that should have been steered, and were run without."""
    gate = conversation.gate
    if "all" in demand.positions:
        missed = gate
    elif "after_image" in demand.positions:
        missed = gate & (conversation.last_image < start - 1)
    else:
        return
    if bool(missed.any()):
        raise SteeringError(
            f"the cache holds {start} tokens that were run outside of this steering, or under "
            "another one; positions 'all' and 'after_image' would have steered them. Prefill "
            "inside steer(), or steer positions 'last'"
        )


def _unknown_cache() -> SteeringError:
    return SteeringError(
        "the model was called with a filled KV cache that was never seen inside steer(); say which "
        "rows hold an image, steer(..., has_image=[...]), or start with the whole prompt"
    )
