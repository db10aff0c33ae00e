"""The one file format of cmrm: tensors with their provenance and the identity of their model.

An artifact is a safetensors file (never a pickle) with float32 tensors:

| tensor | shape | what |
|---|---|---|
| `vectors` | [L, d] | shift per decoder layer, from corrupted image to text; added, alpha >= 0 |
| `direction` | [L, d] | refusal direction per layer, harmful minus benign as text |
| `sequential` | [L, d] | vectors of the schedule `sequential`; zero where no layer was chosen |
| `gate.vectors`, `gate.metric` | [n, d], [d, d] | the harm gate (`steering.gate`) |
| `NAME` | any | fitted state of a defence |
| `identity.samples` | [N, 32] | values sampled from the model's weights |

One metadata entry, `cmrm`, holds JSON: format, provenance, recommended setting, gate, records of
what was fitted (`harm_gate.GateRecord`, `gap.GapRecord`), identity, and a sha256 over all of it and
over the tensors, which is checked on load. No local path is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cmrm.errors import ArtifactError, InputError
from cmrm.files import atomic_path
from cmrm.model.identity import Identity, config_hash, identity_of, public_name, summary
from cmrm.model.vlm import VLM
from cmrm.shift.provenance import Provenance, library_versions, provenance_from_json
from cmrm.steering.gate import Gate
from cmrm.steering.setting import Steering

__all__ = ["Artifact", "Provenance", "ShiftVectors", "library_versions"]

FORMAT = "cmrm-artifact/2"
VECTORS = "vectors"
BY_LAYER = frozenset({VECTORS, "direction", "sequential"})
"""Tensors with a row for each decoder layer."""
GATE_VECTORS, GATE_METRIC = "gate.vectors", "gate.metric"
SAMPLES = "identity.samples"


@dataclass(frozen=True, eq=False)
class Artifact:
    """Tensors of one model, in memory: what a file of this format holds."""

    tensors: Mapping[str, torch.Tensor]
    """float32 by name; `vectors` and `direction` are [L, d]."""
    provenance: Provenance
    """Where they come from."""
    recommended: Steering = field(default_factory=Steering)
    """Setting to use `vectors` with."""
    identity: Identity | None = None
    """Of the model; None in files of an older version, which know its config alone."""
    gate: Gate | None = None
    """Harm gate, where it was fitted."""
    records: Mapping[str, Any] = field(default_factory=dict)
    """How well what was fitted does, as JSON: `gap`, `gate`."""

    def __post_init__(self) -> None:
        shape = (self.provenance.n_layers, self.provenance.hidden_size)
        for name, tensor in self.tensors.items():
            by_layer = name in BY_LAYER
            if tensor.dtype != torch.float32:
                raise ArtifactError(f"the tensor {name} is {tensor.dtype}, expected float32")
            if by_layer and tuple(tensor.shape) != shape:
                raise ArtifactError(
                    f"{name} are {tuple(tensor.shape)}, the provenance says {shape}"
                )
            if not bool(torch.isfinite(tensor).all()):
                layers = (~torch.isfinite(tensor)).any(dim=-1).nonzero().flatten().tolist()
                where = f" at decoder layers {layers}" if by_layer else ""
                raise ArtifactError(f"{name} hold NaN or infinity{where}; extract them again")

        gate = self.gate
        if gate and (gate.vectors.shape[1] != shape[1] or gate.layers[-1] >= shape[0]):
            raise ArtifactError("the gate is one of a model of another shape")

    def save(self, path: str | Path) -> Path:
        """Write the artifact; the file appears under its name only when it is whole.

        The same content gives the same bytes.

        Raises:
            ArtifactError: the place cannot be written to.
        """
        target = Path(path)
        tensors = {name: tensor.contiguous() for name, tensor in sorted(self.tensors.items())}
        content: dict[str, Any] = {
            "format": FORMAT, "provenance": asdict(self.provenance),
            "recommended": self.recommended.to_json(), "identity": None,
            "gate": None, "records": dict(self.records),
        }  # fmt: skip
        if self.gate is not None:
            content["gate"] = _gate_to_json(self.gate)
            tensors[GATE_VECTORS] = self.gate.vectors.contiguous()
            if self.gate.metric is not None:
                tensors[GATE_METRIC] = self.gate.metric.contiguous()
        if self.identity is not None:
            content["identity"] = self.identity.to_json()
            tensors[SAMPLES] = self.identity.weights.samples.contiguous()
        content["digest"] = _digest(content, tensors)
        # One entry alone: safetensors writes several in an order that changes from run to run.
        metadata = {"cmrm": json.dumps(content, sort_keys=True)}
        try:
            with atomic_path(target) as part:
                # `save_file` would make a file that its owner alone can read.
                part.write_bytes(save(tensors, metadata=metadata))
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"cannot write {target}: {error}") from error
        return target

    @classmethod
    def load(cls, path: str | Path) -> Artifact:
        """Read an artifact of this format, or one of the older formats.

        Raises:
            ArtifactError: the file is missing, damaged, of another format, or holds NaN.
        """
        source = Path(path)
        if not source.is_file():
            raise ArtifactError(f"there is no artifact at {source}")
        try:
            with safe_open(str(source), "pt") as handle:
                header = (handle.metadata() or {}).get("cmrm", "")
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            return _read(header, tensors)
        except ArtifactError as error:
            raise ArtifactError(f"{source}: {error}") from None
        except _BROKEN as error:
            reason = " ".join(f"{error}".split())[:200] or type(error).__name__
            raise ArtifactError(f"{source} is not a whole artifact of cmrm: {reason}") from None

    def check(self, vlm: VLM, *, other_weights: bool = False) -> None:
        """Refuse a model that these tensors do not belong to; see `model.identity` for what is
        compared.

        Args:
            vlm: the model.
            other_weights: accept another checkpoint of the same shape, such as a fine-tune: layer
                count, width and architecture alone are compared. Whether the vectors are worth
                anything there has to be measured.

        Raises:
            ArtifactError: layer count, width, architecture, config, weights, processor or chat
                template differ; the differences are named.
        """
        made = self.provenance
        pairs = {
            "decoder layers": (made.n_layers, vlm.n_layers),
            "hidden size": (made.hidden_size, vlm.hidden_size),
            "architecture": (made.architecture, type(vlm.model).__name__),
        }
        wrong = [
            f"{name} {there} there, {here} here"
            for name, (there, here) in pairs.items()
            if there not in (here, "unknown")
        ]
        if other_weights and not wrong:
            return
        if self.identity is None:  # an old file, which knows no more than its config
            from cmrm.shift.old_formats import old_config_hash

            known = {config_hash(vlm), old_config_hash(vlm)}
            wrong = [] if made.config_hash in known else wrong or [
                "another config; the artifact was written by an older cmrm, which bound it to "
                "every "
                "field of the config: extract it again"
            ]  # fmt: skip
        elif not wrong:
            wrong = self.identity.differences(identity_of(vlm))
        if wrong:
            raise ArtifactError(
                f"this artifact was estimated on {made.model_id} and does not fit "
                f"{public_name(vlm.model_id)}: {summary(wrong)}; estimate one for this model"
            )


_BROKEN = (
    SafetensorError,
    InputError,
    OSError,
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    RecursionError,
    OverflowError,
    MemoryError,
    IndexError,
    RuntimeError,
)
"""What a damaged file makes the reader raise."""


def _read(header: str, tensors: dict[str, torch.Tensor]) -> Artifact:
    from cmrm.shift.old_formats import OLD_DEFENSE, OLD_SHIFT, old_defense, old_shift

    if header.startswith(OLD_DEFENSE):
        return old_defense(header, tensors)
    content = json.loads(header or "{}")
    if not isinstance(content, dict) or content.get("format") not in (FORMAT, OLD_SHIFT):
        kind = content.get("format") if isinstance(content, dict) else None
        raise ArtifactError(f"it has format {kind!r}, this version reads {FORMAT!r}")
    if content["format"] == OLD_SHIFT:
        return old_shift(content, tensors)
    written = content.pop("digest")
    if written != _digest(content, tensors):
        raise ArtifactError("the file is damaged: its content does not match its digest")
    samples = tensors.pop(SAMPLES, None)
    identity = None
    if content["identity"] is not None:
        if samples is None:
            raise ValueError(f"the tensor {SAMPLES} is missing")
        identity = Identity.from_json(content["identity"], samples)
    gate = _gate_from_json(content.get("gate"), tensors)
    records = content.get("records", {})
    if not isinstance(records, dict):
        raise ValueError("the records are no mapping")
    recommended = Steering.from_json(content["recommended"])
    made = provenance_from_json(content["provenance"])
    return Artifact(tensors, made, recommended, identity, gate, records)


def _gate_to_json(gate: Gate) -> dict[str, Any]:
    names = ("kind", "layers", "threshold", "weights", "bias")
    return {name: getattr(gate, name) for name in names}


def _gate_from_json(values: Mapping[str, Any] | None, tensors: dict[str, torch.Tensor]) -> Any:
    """The gate that `_gate_to_json` wrote, its tensors taken out of `tensors`; None without one."""
    if values is None:
        return None
    numbers = {**values, "layers": tuple(values["layers"]), "weights": tuple(values["weights"])}
    vectors, metric = tensors.pop(GATE_VECTORS), tensors.pop(GATE_METRIC, None)
    return Gate(vectors=vectors, metric=metric, **numbers)


@dataclass(frozen=True, eq=False)
class ShiftVectors:
    """Dataset-level shift per decoder layer, pointing FROM the corrupted-image TO the text-only
    state."""

    vectors: torch.Tensor
    """float32 [L, d]; row l belongs to the output of decoder block l and is ADDED there, times
    alpha >= 0."""
    provenance: Provenance
    """Where they come from."""
    recommended: Steering = field(default_factory=Steering)
    """Setting to use them with."""
    others: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Other tensors of the same artifact by name, such as `direction` [L, d]."""
    identity: Identity | None = None
    """Of the model that they belong to."""
    gate: Gate | None = None
    """Harm gate of the same artifact."""
    records: Mapping[str, Any] = field(default_factory=dict)
    """How well what was fitted on harmful and benign anchors does; see `Artifact`."""

    def __post_init__(self) -> None:
        self._as_artifact()  # which looks at shapes and values

    def _as_artifact(self) -> Artifact:
        tensors = {VECTORS: self.vectors, **self.others}
        return Artifact(
            tensors, self.provenance, self.recommended, self.identity, self.gate, self.records
        )

    @property
    def direction(self) -> torch.Tensor | None:
        """Refusal direction float32 [L, d]; None where no benign anchors were given."""
        return self.others.get("direction")

    @property
    def sequential(self) -> torch.Tensor | None:
        """Vectors of the schedule `sequential`, float32 [L, d]; None where they were not
        estimated."""
        return self.others.get("sequential")

    def with_false_alarms(self, share: float) -> ShiftVectors:
        """The same artifact with its gate at another share of false alarms.

        Raises:
            InputError: it holds no harm gate, or the share is not on the gate's curve.
        """
        from cmrm.shift.harm_gate import GateRecord, at_false_alarms

        if self.gate is None or "gate" not in self.records:
            raise InputError("the artifact holds no harm gate; extract it with benign anchors")
        record = GateRecord.from_json(dict(self.records["gate"]))
        gate, record = at_false_alarms(self.gate, record, share)
        records = {**self.records, "gate": record.to_json()}
        return replace(self, gate=gate, records=records)

    def save(self, path: str | Path) -> Path:
        """Write the artifact; see `Artifact.save`.

        Raises:
            ArtifactError: the place cannot be written to.
        """
        return self._as_artifact().save(path)

    @classmethod
    def load(cls, path: str | Path) -> ShiftVectors:
        """Read an artifact that holds shift vectors.

        Raises:
            ArtifactError: the file is missing, damaged, of another format, or holds no vectors.
        """
        artifact = Artifact.load(path)
        others = dict(artifact.tensors)
        vectors = others.pop(VECTORS, None)
        if vectors is None:
            raise ArtifactError(
                f"{path} holds the fitted state of {artifact.provenance.estimator!r}, no shift "
                "vectors"
            )
        return cls(
            vectors,
            artifact.provenance,
            artifact.recommended,
            others,
            artifact.identity,
            artifact.gate,
            artifact.records,
        )

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, token: str | None = None
    ) -> ShiftVectors:
        """Load from a file, from a folder that holds `shift.safetensors`, or from a hub repository.

        Raises:
            ArtifactError: nothing is there, or it is no whole artifact.
        """
        from cmrm.shift.hub import fetch

        return cls.load(fetch(source, revision=revision, token=token))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        commit_message: str = "Upload shift vectors",
    ) -> str:
        """Upload to a hub repository (made if need be) with a generated card.

        Returns:
            The commit's address.

        Raises:
            ArtifactError: the hub refuses, or cannot be reached.
        """
        from cmrm.shift.hub import card, push

        text = card(self.provenance, self.recommended, repo_id=repo_id, records=self.records)
        return push(repo_id, self.save, text, private=private, token=token, message=commit_message)

    def check(self, vlm: VLM, *, other_weights: bool = False) -> None:
        """Refuse a model that these vectors do not belong to; see `Artifact.check`.

        Raises:
            ArtifactError: the models differ; the differences are named.
        """
        self._as_artifact().check(vlm, other_weights=other_weights)


def _digest(content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """Hex sha256 of the metadata without its digest, and of every tensor by name, dtype, shape and
    bytes."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\x00{name}\x00{tensor.dtype}\x00{tuple(tensor.shape)}\x00".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
