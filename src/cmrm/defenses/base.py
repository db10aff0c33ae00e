"""What a defence is: it may rewrite what is asked, intervene while the model answers, and revise
what was answered.

A defence asks an `Engine`, never a model, and describes what is done to the residual stream as data
(`steering.intervention`): it runs wherever an engine does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from cmrm.defenses.space import Space
from cmrm.engines.base import Contrast, Decoding, Engine, EngineError, Reply
from cmrm.errors import ArtifactError, InputError
from cmrm.model.batching import in_batches
from cmrm.prompts.conditions import Request
from cmrm.prompts.sample import Sample
from cmrm.shift.artifact import Artifact
from cmrm.steering.gate import Gate
from cmrm.steering.intervention import Intervention


@dataclass(frozen=True)
class FitData:
    """What a defence may be fitted on: anchors, never test samples."""

    harmful: Sequence[Sample]
    """Harmful requests, each with an image."""
    benign: Sequence[Sample]
    """Benign requests; CMRM's fill and gate, CAST and AlphaSteer use their images."""
    batch_size: int = 16
    """Prompts per forward pass."""
    more: Sequence[Sample] = ()
    """Further samples with an image whose shift counts beside that of the harmful ones (the CMRM
    paper adds some of LLaVA-Bench-COCO)."""

    @property
    def shifted(self) -> tuple[Sample, ...]:
        """Samples that the shift of the image is estimated on."""
        return (*self.harmful, *self.more)

    @property
    def all(self) -> tuple[Sample, ...]:
        """Every sample."""
        return (*self.harmful, *self.benign, *self.more)


FITTED_WITH = "fitted_with"
"""Record of a saved defence: the settings that its tensors depend on."""


class Defense:
    """An inference-time defence; a subclass overrides what it does and leaves the rest.

    Rows without an image are never changed by the defences here: there the backbone is in its own
    distribution.
    """

    name: str = ""
    """Value of `--defenses`; that of a variant ends with `@` and the variant's name."""
    source: ClassVar[str] = ""
    """Paper."""
    needs_fit: ClassVar[bool] = False
    """Whether `fit` has to be run, or its outcome loaded, before anything is asked."""
    local: ClassVar[bool] = True
    """Whether it belongs to `--defenses all`; a server's own steering does not."""
    fits_on_images: ClassVar[bool] = False
    """Whether `fit` reads the images of `FitData.shifted`."""
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Settings that have a name: `cmrm_dataset@paper`."""

    def __init__(self) -> None:
        self.state: dict[str, torch.Tensor] = {}
        self.gate: Gate | None = None
        self.records: dict[str, Any] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """The defence's settings, for every output."""
        return {}

    @property
    def parts(self) -> list[Defense]:
        """A stack's defences, or the defence itself."""
        return [self]

    def check(self, engine: Engine) -> None:
        """Raise `InputError` where the settings do not suit the model."""

    def space(self, engine: Engine) -> Space:
        """The settings that can be tuned on this model, with their ranges; none by default."""
        return ()

    @property
    def fitted_by(self) -> tuple[object, ...] | None:
        """What `fit` depends on beside the anchors: two of one class with the same are fitted once.

        None: each is fitted on its own.
        """
        return None

    def fit(self, engine: Engine, data: FitData) -> None:
        """Compute `state` (float32 tensors) from anchors."""

    def rewrite(self, engine: Engine, requests: Sequence[Request]) -> list[Request]:
        """Requests that are asked instead of `requests`, row by row."""
        return list(requests)

    def intervene(
        self, engine: Engine, requests: Sequence[Request], keys: Sequence[str]
    ) -> list[Intervention]:
        """What is done to the residual stream while this batch is answered; extra passes are run
        here.

        `keys` seed what is drawn for each row.
        """
        return []

    def contrast(self, engine: Engine, requests: Sequence[Request]) -> Contrast | None:
        """Second conversations whose logits are weighed against those of this batch; None without
        any."""
        return None

    def revise(
        self,
        engine: Engine,
        requests: Sequence[Request],
        replies: Sequence[Reply],
        options: Decoding,
    ) -> list[Reply]:
        """Replies that are given instead of `replies`, row by row."""
        return list(replies)

    def save(self, path: Path, engine: Engine) -> None:
        """Write `state` as an artifact of this model.

        Raises:
            ArtifactError: the place cannot be written to.
        """
        records = {**self.records, FITTED_WITH: self._fitted_with()}
        engine.artifact(self.state, self.name, self.gate, records).save(path)

    def load(self, path: Path, engine: Engine) -> None:
        """Read `state` as `save` wrote it.

        Raises:
            ArtifactError: the file is damaged, belongs to another defence, was fitted with other
                settings, or on another model.
        """
        artifact = Artifact.load(path)
        fitted = artifact.provenance.estimator
        if fitted != self.name:
            raise ArtifactError(
                f"{path} holds no fitted {self.name}, but {fitted or 'shift vectors'}"
            )
        records = dict(artifact.records)
        made = records.pop(FITTED_WITH, None)
        if made not in (None, self._fitted_with()):
            raise ArtifactError(
                f"{path} was fitted with {made['settings']}, not with "
                f"{self._fitted_with()['settings']}; fit {self.name} again, or name those settings"
            )
        engine.accept(artifact)
        self.state = dict(artifact.tensors)
        self.gate, self.records = artifact.gate, records

    def _fitted_with(self) -> dict[str, str]:
        """What `fit` depended on, as text; all settings where the defence does not say it."""
        made = self.settings if self.fitted_by is None else self.fitted_by
        return {"settings": json.dumps(made, default=str)}

    def fingerprint(self) -> str:
        """Hex sha256 of the fitted tensors."""
        digest = hashlib.sha256()
        for part in self.parts:
            for name, tensor in sorted(part.state.items()):
                digest.update(f"\x00{part.name}\x00{name}\x00{tuple(tensor.shape)}\x00".encode())
                digest.update(tensor.float().contiguous().numpy().tobytes())
            if part.gate is not None:
                digest.update(f"\x00{part.name}\x00gate {part.gate.key}".encode())
        return digest.hexdigest()

    def fitted(self, name: str) -> torch.Tensor:
        """One tensor of `state`.

        Raises:
            InputError: the defence was not fitted.
        """
        if name not in self.state:
            raise InputError(f"the defence {self.name!r} has to be fitted on anchors first")
        return self.state[name]


class NoDefense(Defense):
    """The untouched model."""

    name = "none"
    source = "-"


def typed(name: str, value: object, kind: type, expected: str) -> None:
    """Refuse a setting's `value` of another kind; a bool is no number.

    Raises:
        InputError: it is of another kind.
    """
    right = isinstance(value, (int, float) if kind is float else kind)
    if not right or (kind is not bool and isinstance(value, bool)):
        raise InputError(f"{name} is {value!r}; it is {expected}")


class Stack(Defense):
    """Several defences at once: rewritten from left to right, steered together, revised from left
    to right."""

    def __init__(self, parts: Sequence[Defense]) -> None:
        super().__init__()
        self._parts = list(parts)
        self.name = "+".join(part.name for part in parts)

    @property
    def parts(self) -> list[Defense]:
        """The defences, in order."""
        return self._parts

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the parts, by name."""
        return {part.name: part.settings for part in self.parts}

    def check(self, engine: Engine) -> None:
        """Check every part."""
        for part in self.parts:
            part.check(engine)

    def fit(self, engine: Engine, data: FitData) -> None:
        """Fit every part."""
        for part in self.parts:
            part.fit(engine, data)

    def rewrite(self, engine: Engine, requests: Sequence[Request]) -> list[Request]:
        """All rewrites, one after the other."""
        for part in self.parts:
            requests = part.rewrite(engine, requests)
        return list(requests)

    def intervene(
        self, engine: Engine, requests: Sequence[Request], keys: Sequence[str]
    ) -> list[Intervention]:
        """All interventions; the extra passes of each are run on the unsteered model."""
        return [made for part in self.parts for made in part.intervene(engine, requests, keys)]

    def contrast(self, engine: Engine, requests: Sequence[Request]) -> Contrast | None:
        """The contrast of the part that has one.

        Raises:
            InputError: several parts have one.
        """
        made = [(part.name, part.contrast(engine, requests)) for part in self.parts]
        names = [name for name, contrast in made if contrast is not None]
        if len(names) > 1:
            raise InputError(
                f"{' and '.join(names)} each decode a second conversation; stack one of them alone"
            )
        return next((contrast for _, contrast in made if contrast is not None), None)

    def revise(
        self,
        engine: Engine,
        requests: Sequence[Request],
        replies: Sequence[Reply],
        options: Decoding,
    ) -> list[Reply]:
        """All revisions, one after the other."""
        for part in self.parts:
            replies = part.revise(engine, requests, replies, options)
        return list(replies)


def respond(
    engine: Engine,
    defense: Defense,
    requests: Sequence[Request],
    options: Decoding | None = None,
    *,
    keys: Sequence[str] | None = None,
    batch_size: int | None = None,
) -> list[Reply]:
    """Replies of the defended model to conversations, in the order given.

    Args:
        engine: where the model answers.
        defense: what defends it.
        requests: conversations.
        options: decoding of the reply itself; greedy, 48 tokens, when None.
        keys: seeds of what a defence draws for each row (a noise image); the row's text where None.
        batch_size: prompts per batch; all at once when None. A batch that exhausts the memory is
            halved.

    Raises:
        InputError: a request cannot be used, or the defence has not been fitted. Whatever the
            engine raises.
    """
    options = options or Decoding()
    seeds = list(keys) if keys is not None else [request.text for request in requests]

    def work(places: list[int]) -> list[Reply]:
        batch = defense.rewrite(engine, [requests[k] for k in places])
        interventions = defense.intervene(engine, batch, [seeds[k] for k in places])
        contrast = defense.contrast(engine, batch)
        more: dict[str, Any] = {}
        if contrast is not None:
            if not engine.contrasts:
                raise EngineError(
                    f"the engine {engine.name!r} cannot decode two conversations side by side, "
                    f"which {defense.name!r} needs; use the engine on transformers"
                )
            more["contrast"] = contrast
        replies = engine.answer(batch, interventions, options, batch_size=len(batch), **more)
        return defense.revise(engine, batch, replies, options)

    size = len(requests) if batch_size is None else batch_size
    batches = in_batches(range(len(requests)), max(1, size), work)
    return [reply for _, replies in batches for reply in replies]
