"""What runs on a model while it is steered: one tracker for each model.

State belongs to the KV cache (a weak-keyed table), never to the pass before. Two conversations in
turn, a second turn, several candidates in one pass, chunks, beams and static caches are told apart
by the cache and by the columns in it (`steering.classify`). `generate` is watched while steering is
active, because it alone knows where the prompt ends when a pass holds a part of it, or generated
tokens beside it.

Steering belongs to the context that asked for it (`contextvars`: a thread, an asyncio task). Passes
of other threads on the same model are left alone. A thread that is to be steered too is started
with `contextvars.copy_context().run`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from cmrm.errors import SteeringError
from cmrm.model.compat import backbone_of, cache_given, cache_length, cache_of
from cmrm.steering.classify import Call, Classifier, Demand, GenerateScope
from cmrm.steering.passes import UNSTEERED, Pass
from cmrm.steering.positions import Conversation, Layout

if TYPE_CHECKING:
    from cmrm.model.vlm import VLM
    from cmrm.steering.hooks import Session

ACTIVE: ContextVar[tuple[Session, ...]] = ContextVar("cmrm_active_steering", default=())
"""Open steering of this context, the outermost first."""

_SCOPES: ContextVar[tuple[tuple[Tracker, GenerateScope], ...]] = ContextVar(
    "cmrm_generate_scopes", default=()
)
_TRACKERS: WeakKeyDictionary[nn.Module, Tracker] = WeakKeyDictionary()
_GUARD = threading.RLock()


class Tracker:
    """See the module; made by `tracker_of`. It holds no reference to its model."""

    def __init__(self, image_token_id: int) -> None:
        self.classifier = Classifier(image_token_id)
        self.conversations: WeakKeyDictionary[Any, Conversation] = WeakKeyDictionary()
        """KV cache -> conversation."""
        self.passes: dict[int, Pass] = {}
        """Thread -> the pass that it runs."""
        self.latest: Pass | None = None
        """The pass that began last, for compiled code, which knows no threads."""
        self._pending: dict[int, Conversation] = {}
        self._sessions = 0
        self._handles: list[Any] = []
        self._blocks: dict[int, tuple[Any, int]] = {}
        self._replaced: dict[str, Any] = {}

    def open(self, vlm: VLM, layers: Collection[int], hook: Callable[[int], Any]) -> None:
        """Watch passes, `generate` and the blocks of `layers` for one more session."""
        with _GUARD:
            if self._sessions == 0:
                self._watch(vlm)
            self._sessions += 1
            for layer in layers:
                handle, users = self._blocks.get(layer, (None, 0))
                if handle is None:
                    # Before any other hook of the block: who records its output sees the edit.
                    handle = vlm.layers[layer].register_forward_hook(hook(layer), prepend=True)
                self._blocks[layer] = (handle, users + 1)

    def close(self, vlm: VLM, layers: Collection[int]) -> None:
        """Undo `open`; the model is untouched again when the last session is closed."""
        with _GUARD:
            for layer in layers:
                handle, users = self._blocks.pop(layer)
                if users > 1:
                    self._blocks[layer] = (handle, users - 1)
                else:
                    handle.remove()
            self._sessions -= 1
            if self._sessions == 0:
                for handle in self._handles:
                    handle.remove()
                self._handles.clear()
                self._restore(vlm.model)
                self.passes.clear()
                self._pending.clear()
                self.classifier.forget()
                self.latest = None

    def _watch(self, vlm: VLM) -> None:
        backbone, model = backbone_of(vlm.model), vlm.model
        self._handles = [
            backbone.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            backbone.register_forward_hook(self._after, always_call=True),
        ]
        replacements: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
            "generate": self._watched_generate,
            "generate_batch": self._refused_packing,
            "init_continuous_batching": self._refused_packing,
        }
        for name, replacement in replacements.items():
            original = getattr(model, name, None)
            if original is not None:
                self._replaced[name] = vars(model).get(name)
                vars(model)[name] = replacement(original)

    def _restore(self, model: Any) -> None:
        for name, own in self._replaced.items():
            if own is None:
                vars(model).pop(name, None)
            else:
                vars(model)[name] = own
        self._replaced.clear()

    def active(self) -> tuple[Session, ...]:
        """Open sessions of this context on this model."""
        return tuple(session for session in ACTIVE.get() if session.tracker is self)

    def _watched_generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            sessions = self.active()
            if not sessions:
                return original(*args, **kwargs)
            scope = GenerateScope.of(args, kwargs)
            with sessions[-1].vlm.lock, self._entered(scope):
                output = original(*args, **kwargs)
            for session in sessions:
                session.finished(scope.conversation)
            return output

        return generate

    def _refused_packing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def refused(*args: Any, **kwargs: Any) -> Any:
            if self.active():
                raise SteeringError(
                    "continuous batching packs conversations into one row, in a thread of its own; "
                    "it cannot be steered"
                )
            return original(*args, **kwargs)

        return refused

    @contextmanager
    def _entered(self, scope: GenerateScope) -> Iterator[None]:
        token = _SCOPES.set((*_SCOPES.get(), (self, scope)))
        try:
            yield
        finally:
            _SCOPES.reset(token)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _outside_of_the_graph(self._begin, args, kwargs)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        _outside_of_the_graph(self._end, output)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a pass: make its `Pass` known to the blocks' hooks."""
        thread = threading.get_ident()
        self._pending.pop(thread, None)
        sessions = self.active()
        current = self._pass(sessions, args, kwargs, thread) if sessions else UNSTEERED
        self.passes[thread] = current
        self.latest = current

    def _pass(
        self,
        sessions: tuple[Session, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        thread: int,
    ) -> Pass:
        ids, embeds = (
            kwargs.get("input_ids", args[0] if args else None),
            kwargs.get("inputs_embeds"),
        )
        tokens = ids if ids is not None else embeds
        if tokens is None:
            raise SteeringError(
                "the model was called without input_ids and inputs_embeds; steering cannot see the "
                "prompt"
            )
        cache = cache_given(kwargs)
        known = self.conversations.get(cache) if cache is not None else None
        call = Call(ids, tokens, kwargs.get("attention_mask"), cache, cache_length(cache), known)
        if known is not None and _repeats(known, call, sessions):
            known.length += 1
            assert isinstance(known.decoding, Pass)
            for session in sessions:
                session.stepped(known.decoding)
            return known.decoding
        scope = next((scope for owner, scope in reversed(_SCOPES.get()) if owner is self), None)
        conversation = self.classifier.conversation(call, _demand(sessions), scope)
        conversation.length = call.start + call.width
        if cache is not None:
            self.conversations[cache] = conversation
        else:
            self._pending[thread] = conversation
        decoding = call.width == 1 and call.start >= conversation.prompt_end
        layout = Layout.of(conversation, call.start, call.width, call.real, tokens.device)
        current = Pass((call.rows, call.width), layout, sessions, decoding, conversation)
        conversation.decoding = current if decoding and cache is not None else None
        for session in sessions:
            session.began(conversation, current)
        return current

    def _end(self, output: Any) -> None:
        """After a pass: the cache that the model made belongs to the conversation."""
        thread = threading.get_ident()
        self.passes.pop(thread, None)
        self.latest = None
        conversation = self._pending.pop(thread, None)
        cache = cache_of(output)
        if conversation is not None and cache is not None:
            self.conversations[cache] = conversation


def _repeats(known: Conversation, call: Call, sessions: tuple[Session, ...]) -> bool:
    """Whether a pass is one more generated token of each row, as the pass before it was."""
    return (
        call.width == 1
        and call.start == known.length >= known.prompt_end
        and call.rows == known.rows
        and isinstance(known.decoding, Pass)
        and known.decoding.sessions == sessions
    )


def _demand(sessions: tuple[Session, ...]) -> Demand:
    has_image = next((s.has_image for s in sessions if s.has_image is not None), None)
    positions = frozenset(p for session in sessions for p in session.positions)
    return Demand(positions, "+".join(session.key for session in sessions), has_image)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _outside_of_the_graph(work: Callable[..., None], *args: Any) -> None:
    work(*args)


def tracker_of(vlm: VLM) -> Tracker:
    """The tracker of a model, made on first use."""
    with _GUARD:
        tracker = _TRACKERS.get(vlm.model)
        if tracker is None:
            tracker = _TRACKERS[vlm.model] = Tracker(vlm.image_token_id)
        return tracker
