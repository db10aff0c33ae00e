"""What a defence is: it may rewrite what is asked, steer the model while it answers, and revise what was answered."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cmrm.prompts.conditions import Request
from cmrm.errors import ArtifactError, InputError
from cmrm.files import atomic_path
from cmrm.engines.transformers import complete
from cmrm.measure.memory import peak_memory
from cmrm.model.vlm import VLM, config_hash
from cmrm.prompts.sample import Sample

FORMAT = "cmrm-defense/1"


@dataclass(frozen=True)
class Reply:
    """One reply."""

    text: str
    """Special tokens removed, white space stripped at both ends."""
    tokens: int
    """Generated tokens of this reply, the end-of-turn token included; those of questions that a defence asks on the way are
    not among them."""


@dataclass(frozen=True)
class FitData:
    """What a defence may be fitted on: anchors, never test samples."""

    harmful: Sequence[Sample]
    """Harmful requests, each with an image."""
    benign: Sequence[Sample]
    """Benign requests; their images are not looked at."""
    batch_size: int = 16
    """Prompts per forward pass."""
    more: Sequence[Sample] = ()
    """Further samples with an image whose shift counts beside that of the harmful ones (the CMRM paper adds some of
    LLaVA-Bench-COCO)."""

    @property
    def shifted(self) -> tuple[Sample, ...]:
        """What the shift of the image is estimated on."""
        return (*self.harmful, *self.more)

    @property
    def all(self) -> tuple[Sample, ...]:
        """Every sample."""
        return (*self.harmful, *self.benign, *self.more)


class Defense:
    """An inference-time defence; a subclass overrides what it does and leaves the rest.

    Rows without an image are never touched by the defences here: there the backbone is in its own distribution.
    """

    name: str = ""
    """What `--defenses` takes; that of a variant ends with `@` and the variant's name."""
    source: ClassVar[str] = ""
    """Paper."""
    needs_fit: ClassVar[bool] = False
    """Whether `fit` has to be run, or its outcome loaded, before anything is asked."""
    fits_on_images: ClassVar[bool] = False
    """Whether `fit` looks at the images of `FitData.shifted`."""
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Settings that have a name: `cmrm_dataset@paper`."""

    def __init__(self) -> None:
        self.state: dict[str, torch.Tensor] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """What the defence was set to, for every output."""
        return {}

    @property
    def parts(self) -> list[Defense]:
        """A stack's defences, or the one itself."""
        return [self]

    def check(self, vlm: VLM) -> None:
        """Raise `InputError` where the settings do not suit the model."""

    @property
    def fitted_by(self) -> tuple[object, ...] | None:
        """What `fit` hangs on beside the anchors; two of one class with the same are fitted once. None: each is fitted on its own."""
        return None

    def fit(self, vlm: VLM, data: FitData) -> None:
        """Compute `state` (float32 tensors) from anchors."""

    def rewrite(self, vlm: VLM, requests: Sequence[Request]) -> list[Request]:
        """What is asked instead of `requests`, row by row."""
        return list(requests)

    def steering(self, vlm: VLM, requests: Sequence[Request], keys: Sequence[str]) -> AbstractContextManager[None]:
        """A context in which the model is steered while it answers this batch. Extra passes are run before it is entered."""
        return nullcontext()

    def revise(
        self, vlm: VLM, requests: Sequence[Request], replies: Sequence[Reply], *, max_new_tokens: int
    ) -> list[Reply]:
        """What is answered instead of `replies`, row by row."""
        return list(replies)

    def save(self, path: Path, vlm: VLM) -> None:
        """Write `state`, bound to this model, as safetensors."""
        metadata = {"cmrm": f"{FORMAT}\n{self.name}\n{config_hash(vlm)}"}
        tensors = {k: v.float().contiguous() for k, v in self.state.items()}
        with atomic_path(path) as part:
            save_file(tensors, str(part), metadata=metadata)

    def load(self, path: Path, vlm: VLM) -> None:
        """Read `state` as `save` wrote it.

        Raises:
            ArtifactError: the file is none of this defence's, or was fitted on another model.
        """
        try:
            with safe_open(str(path), "pt") as handle:
                held = ((handle.metadata() or {}).get("cmrm") or "").split("\n")
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{path} cannot be read: {error}") from None
        if held[:2] != [FORMAT, self.name]:
            raise ArtifactError(f"{path} holds no fitted {self.name}")
        if held[2] != config_hash(vlm):
            raise ArtifactError(f"{path} was fitted on another model than {vlm.model_id}; fit it anew")
        self.state = tensors

    def fingerprint(self) -> str:
        """Hex sha256 of what was fitted."""
        digest = hashlib.sha256()
        for part in self.parts:
            for name, tensor in sorted(part.state.items()):
                digest.update(f"\x00{part.name}\x00{name}\x00".encode() + tensor.float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def fitted(self, name: str) -> torch.Tensor:
        """One tensor of `state`.

        Raises:
            InputError: the defence was not fitted.
        """
        if name not in self.state:
            raise InputError(f"the defence {self.name!r} has to be fitted on anchors first")
        return self.state[name]


def layer_numbers(given: Sequence[int] | None) -> tuple[int, ...] | None:
    """Layers of a setting as a tuple; None: all.

    Raises:
        InputError: they are no list of whole numbers.
    """
    if given is None:
        return None
    if isinstance(given, str) or not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in given):
        raise InputError(f"layers are {given!r}; expected a list of decoder layers, counted from 0, such as [0, 1, 2]")
    return tuple(given)


def typed(name: str, value: object, kind: type, what: str) -> None:
    """Raise `InputError` where a setting's `value` is of another kind; a bool is no number.

    Raises:
        InputError: it is.
    """
    good = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not good:
        raise InputError(f"{name} is {value!r}; it is {what}")


class Stack(Defense):
    """Several defences at once: rewritten from left to right, steered together, revised from left to right."""

    def __init__(self, parts: Sequence[Defense]) -> None:
        super().__init__()
        self._parts = list(parts)

    @property
    def parts(self) -> list[Defense]:
        """The defences, in order."""
        return self._parts

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the parts, by name."""
        return {part.name: part.settings for part in self.parts}

    def fit(self, vlm: VLM, data: FitData) -> None:
        """Fit every part."""
        for part in self.parts:
            part.fit(vlm, data)

    def rewrite(self, vlm: VLM, requests: Sequence[Request]) -> list[Request]:
        """All rewrites, one after the other."""
        for part in self.parts:
            requests = part.rewrite(vlm, requests)
        return list(requests)

    def steering(self, vlm: VLM, requests: Sequence[Request], keys: Sequence[str]) -> AbstractContextManager[None]:
        """All at once; the extra passes of each are run on the unsteered model."""
        return _all([part.steering(vlm, requests, keys) for part in self.parts])

    def revise(
        self, vlm: VLM, requests: Sequence[Request], replies: Sequence[Reply], *, max_new_tokens: int
    ) -> list[Reply]:
        """All revisions, one after the other."""
        for part in self.parts:
            replies = part.revise(vlm, requests, replies, max_new_tokens=max_new_tokens)
        return list(replies)


@contextmanager
def _all(contexts: Sequence[AbstractContextManager[None]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@torch.inference_mode()
def respond(
    vlm: VLM,
    defense: Defense,
    requests: Sequence[Request],
    *,
    max_new_tokens: int,
    keys: Sequence[str] | None = None,
    **options: Any,
) -> list[Reply]:
    """Replies of the defended model to one batch of conversations, in order.

    Args:
        vlm: the model.
        defense: what defends it.
        requests: one batch.
        max_new_tokens: length limit of a reply.
        keys: seeds of what a defence draws per row (a noise image); its text where None.
        options: of transformers' `generate`, for the reply itself; greedy without.
    """
    held = list(keys) if keys is not None else [request.text for request in requests]
    asked = defense.rewrite(vlm, requests)
    with defense.steering(vlm, asked, held):
        texts, counts = complete(vlm, asked, max_new_tokens=max_new_tokens, **options)
    replies = [Reply(text, count) for text, count in zip(texts, counts, strict=True)]
    return defense.revise(vlm, asked, replies, max_new_tokens=max_new_tokens)


@dataclass
class Meter:
    """Counts what passes through the backbone, and the time that it takes."""

    prefills: int = 0
    """Prompts, or parts of them behind a cached prefix, that were run."""
    prompt_tokens: int = 0
    """Their tokens, padding included."""
    decoded_tokens: int = 0
    """Tokens that were run one at a time."""
    seconds: float = 0.0
    """Wall-clock time inside `watching`."""
    requests: int = 0
    """Requests that were answered, as the caller says."""
    peak_bytes: int | None = None
    """Most memory that a block inside `watching` held above what was there before; None where it cannot be measured."""
    handles: list[Any] = field(default_factory=list, repr=False)

    @contextmanager
    def watching(self, vlm: VLM, requests: int) -> Iterator[None]:
        """Count inside the block, for so many requests."""
        handle = vlm.layers[0].register_forward_pre_hook(self._see, with_kwargs=True)
        try:
            with peak_memory(vlm.device) as peak:
                start = time.perf_counter()
                yield
                self.seconds += time.perf_counter() - start
                self.requests += requests
        finally:
            handle.remove()
        if peak.extra is not None:
            self.peak_bytes = max(self.peak_bytes or 0, peak.extra)

    def _see(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        rows, width = hidden.shape[:2]
        if width == 1:
            self.decoded_tokens += rows
        else:
            self.prefills += rows
            self.prompt_tokens += rows * width

    def per_request(self) -> dict[str, float]:
        """All of it divided by the number of requests."""
        n = max(1, self.requests)
        return {
            "prefills": round(self.prefills / n, 3),
            "prompt_tokens": round(self.prompt_tokens / n, 1),
            "decoded_tokens": round(self.decoded_tokens / n, 1),
            "seconds": round(self.seconds / n, 4),
        }
