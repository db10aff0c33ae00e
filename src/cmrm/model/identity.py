"""What identifies a model: config, weights, processor and chat template, compared value by value.

Two questions are asked of an identity. Does a stored tensor belong to this model (`differences`)?
Other weights, another chat template or another image size are a difference. A changed `use_cache`
or pad token, a new default of the library, another dtype or a quantised load of the same weights
are none. And is it the very same setting (`Identity.key`), so that a stored reply can be used
again? There every value counts.

Weights are compared tensor by tensor: by a checksum where both sides have them in one dtype, by
sampled values within the rounding of both dtypes otherwise. A tensor that one side keeps in a
quantised form or offloaded is not compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from cmrm.model.vlm import VLM
from cmrm.model.weights import (
    SAMPLES,
    Weights,
    address_of,
    checksum,
    is_readable,
    kind_of,
    sample_of,
    sum_of,
    tensors_of,
)

VOLATILE = frozenset(
    [
        "transformers_version",
        "_name_or_path",
        "name_or_path",
        "dtype",
        "torch_dtype",
        "_commit_hash",
        "_attn_implementation",
        "_attn_implementation_internal",
        "attn_implementation",
        "_experts_implementation",
        "experts_implementation",
        "use_cache",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "use_return_dict",
        "torchscript",
        "problem_type",
        "id2label",
        "label2id",
        "num_labels",
        "finetuning_task",
        "task_specific_params",
        "architectures",
        "auto_map",
        "quantization_config",
        "gradient_checkpointing",
        "initializer_range",
        "initializer_factor",
        "attention_dropout",
        "hidden_dropout",
        "dropout",
        "embd_pdrop",
        "resid_pdrop",
        "attn_pdrop",
        "hidden_dropout_prob",
        "layerdrop",
        "tokenizer_class",
        "prefix",
        "chunk_size_feed_forward",
        "use_bfloat16",
        "tie_word_embeddings",
        "projection_dim",
        "logit_scale_init_value",
    ]
)
"""Fields of a config that decide no state of the residual stream."""

VOLATILE_IMAGES = frozenset(
    [
        "image_processor_type",
        "processor_class",
        "_processor_class",
        "feature_extractor_type",
        "backend",
        "data_format",
        "input_data_format",
        "device",
        "return_tensors",
        "disable_grouping",
        "do_convert_rgb",
        "_valid_processor_keys",
        "video_processor_type",
        "image_seq_length",
        "auto_map",
    ]
)
"""Fields of an image processor that decide no pixel."""


@dataclass(frozen=True, eq=False)
class Identity:
    """What decides the residual stream of a model, and the replies that are read off it."""

    architecture: str
    """Class name of the model."""
    config: Mapping[str, Any]
    """Dotted name -> value, without `VOLATILE`."""
    processor: Mapping[str, Any]
    """Dotted name -> value: image processing, and the number of image tokens."""
    template: str
    """Hex sha256 of the chat template."""
    vocabulary: str
    """Hex sha256 of the tokenizer's vocabulary without added tokens."""
    weights: Weights
    """Of every tensor."""

    def differences(self, other: Identity) -> list[str]:
        """What distinguishes the two models, most telling first; empty when states are
        interchangeable."""
        lines = []
        if self.architecture != other.architecture:
            lines.append(f"architecture {self.architecture} there, {other.architecture} here")
        lines += self._text_differences(
            other.config, other.processor, other.template, other.vocabulary
        )
        tensors = self.weights.differences(other.weights)
        if tensors:
            lines.append(f"other weights ({len(tensors)} tensors differ, the first: {tensors[0]})")
        return lines

    def unlike(self, config: Any, processor: Any) -> list[str]:
        """What distinguishes the model from one that has this transformers config and processor,
        its weights aside; empty where nothing does."""
        template = hashlib.sha256(_template(processor).encode()).hexdigest()
        return self._text_differences(
            _flat(config.to_dict(), VOLATILE), _processor_values(processor), template,
            _vocabulary(processor.tokenizer),
        )  # fmt: skip

    def _text_differences(
        self,
        config: Mapping[str, Any],
        processor: Mapping[str, Any],
        template: str,
        vocabulary: str,
    ) -> list[str]:
        lines = []
        for title, there, here in (
            ("config", self.config, config), ("processor", self.processor, processor),
        ):  # fmt: skip
            for name in there:
                if name in here and there[name] != here[name]:
                    lines.append(
                        f"{title} {name} {_short(there[name])} there, {_short(here[name])} here"
                    )
        if self.template != template:
            lines.append("another chat template")
        if self.vocabulary != vocabulary:
            lines.append("another vocabulary")
        return lines

    @property
    def key(self) -> str:
        """Hex sha256 of everything, dtypes included: equal for the very same setting alone."""
        weights = self.weights
        parts = [
            self.architecture,
            dict(self.config),
            dict(self.processor),
            self.template,
            self.vocabulary,
            list(zip(weights.names, weights.kinds, weights.checksums, strict=True)),
        ]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
        digest.update(weights.samples.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """As JSON, but for the sampled values, which are a tensor of their own."""
        weights = self.weights
        return {
            "architecture": self.architecture,
            "config": dict(self.config),
            "processor": dict(self.processor),
            "template": self.template,
            "vocabulary": self.vocabulary,
            "weights": [
                list(row)
                for row in zip(weights.names, weights.kinds, weights.checksums, strict=True)
            ],
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], samples: torch.Tensor) -> Identity:
        """The identity that `to_json` wrote, with its sampled values.

        Raises:
            KeyError, TypeError, ValueError: it has another form.
        """
        rows = [tuple(map(str, row)) for row in stored["weights"]]
        if any(len(row) != 3 for row in rows) or tuple(samples.shape) != (len(rows), SAMPLES):
            raise ValueError("the identity's weights have another form")
        names, kinds, checksums = zip(*rows, strict=True) if rows else ((), (), ())
        return cls(
            str(stored["architecture"]),
            dict(stored["config"]),
            dict(stored["processor"]),
            str(stored["template"]),
            str(stored["vocabulary"]),
            Weights(names, kinds, checksums, samples),
        )


_KNOWN: WeakKeyDictionary[nn.Module, tuple[Any, Identity]] = WeakKeyDictionary()
"""Model -> the state in which its identity was computed, and the identity."""


def identity_of(vlm: VLM) -> Identity:
    """Identity of the model as it is now: adapters that are active, weights as they stand.

    The outcome is kept until the model has changed, for which every weight is read once at each
    call.
    """
    with vlm.lock:
        state = state_of(vlm, whole=True)
        known = _KNOWN.get(vlm.model)
        if known is None or known[0] != state:
            known = (state, _identity(vlm, state.samples))
            _KNOWN[vlm.model] = known
        return known[1]


@dataclass(frozen=True, eq=False)
class State:
    """A quick look at everything that changes states: adapters, tensors and values sampled from
    them."""

    tensors: tuple[tuple[Any, ...], ...]
    """(name, kind, shape, address, version) of every tensor that takes part."""
    samples: torch.Tensor
    """float32 [N, SAMPLES]."""
    texts: tuple[str, ...]
    """Config, processor and chat template."""
    sums: tuple[int, ...] = ()
    """Sum of each tensor's bytes as words; empty where only samples were read."""

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, State)
            and (self.tensors, self.sums) == (other.tensors, other.sums)
            and self.texts == other.texts
            and torch.equal(self.samples.nan_to_num(), other.samples.nan_to_num())
        )

    def __hash__(self) -> int:
        return hash((self.tensors, self.texts))


def state_of(vlm: VLM, *, whole: bool = False) -> State:
    """The model's state now: adapter switches, merges and writes to `.data` change it.

    It costs milliseconds. With `whole` every weight is read once, as a generated token does.
    Without, a write past the version counter of torch that leaves all of a tensor's `SAMPLES`
    sampled values as they were is not seen.
    """
    tensors, samples, sums = [], [], []
    for name, tensor in tensors_of(vlm.model):
        tensors.append((name, kind_of(tensor), tuple(tensor.shape), *address_of(tensor)))
        samples.append(sample_of(tensor))
        if whole:
            sums.append(sum_of(tensor))
    devices = {values.device for values in samples}
    if len(devices) == 1 and samples:
        sampled = torch.stack(samples).float().cpu()
    else:
        sampled = (
            torch.stack([values.float().cpu() for values in samples])
            if samples
            else torch.empty(0, SAMPLES)
        )
    texts = (
        json.dumps(_config_values(vlm.model), sort_keys=True, default=str),
        json.dumps(_processor_values(vlm.processor), sort_keys=True, default=str),
        _template(vlm.processor),
    )
    summed = {total.device for total in sums}
    totals = torch.stack(sums).tolist() if len(summed) == 1 else [int(total) for total in sums]
    return State(tuple(tensors), sampled, texts, tuple(totals))


def _identity(vlm: VLM, samples: torch.Tensor) -> Identity:
    names, kinds, checksums = [], [], []
    for name, tensor in tensors_of(vlm.model):
        names.append(name)
        kinds.append(kind_of(tensor))
        checksums.append(checksum(tensor) if is_readable(tensor) else "")
    weights = Weights(tuple(names), tuple(kinds), tuple(checksums), samples)
    return Identity(
        type(vlm.model).__name__,
        _config_values(vlm.model),
        _processor_values(vlm.processor),
        hashlib.sha256(_template(vlm.processor).encode()).hexdigest(),
        _vocabulary(vlm.tokenizer),
        weights,
    )


def _config_values(model: Any) -> dict[str, Any]:
    return _flat(model.config.to_dict(), VOLATILE)


def _processor_values(processor: Any) -> dict[str, Any]:
    """Image processing, and plain settings of the processor such as the patch size."""
    values = _flat({"image_processor": processor.image_processor.to_dict()}, VOLATILE_IMAGES)
    for name, value in vars(processor).items():
        if isinstance(value, bool | int | float) and not name.startswith("_"):
            values[name] = _plain(value)
    return values


def _flat(values: Mapping[str, Any], volatile: frozenset[str], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names; absent values and `volatile` names are left out."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if str(name) in volatile or value is None:
            continue
        whole = f"{prefix}{name}"
        if isinstance(value, Mapping) or hasattr(value, "to_dict"):
            inner = value if isinstance(value, Mapping) else value.to_dict()
            flat |= _flat(inner, volatile, f"{whole}.")
        else:
            flat[whole] = _plain(value)
    return flat


def _plain(value: Any) -> Any:
    """A setting as JSON has it; whole floats are integers, as files write either."""
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, list | tuple | set | frozenset):
        return [
            _plain(item)
            for item in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)
        ]
    if isinstance(value, bool | str | int) or value is None:
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in sorted(value.items())}
    return str(value)


def _template(processor: Any) -> str:
    template = getattr(processor, "chat_template", None) or getattr(
        processor.tokenizer, "chat_template", ""
    )
    return template if isinstance(template, str) else json.dumps(template, sort_keys=True)


def _vocabulary(tokenizer: Any) -> str:
    added = set(getattr(tokenizer, "added_tokens_encoder", {}))
    pairs = sorted(
        (index, token) for token, index in tokenizer.get_vocab().items() if token not in added
    )
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def config_hash(vlm: VLM) -> str:
    """Hex sha256 of the config's values that decide states."""
    return hashlib.sha256(
        json.dumps(_config_values(vlm.model), sort_keys=True).encode()
    ).hexdigest()


def public_name(model_id: str) -> str:
    """A model's name as files and cards show it: a hub id as it is, of a local path its last part
    alone."""
    parts = model_id.replace("\\", "/").rstrip("/").split("/")
    local = len(parts) != 2 or not all(parts) or parts[0] in {".", "..", "~"} or ":" in parts[0]
    if len(parts) > 1 and (local or Path(model_id).exists()):
        return parts[-1] or "model"
    return model_id


def summary(differences: Sequence[str], *, most: int = 3) -> str:
    """The first few of `Identity.differences` in one line."""
    shown = "; ".join(differences[:most])
    return shown + (f"; and {len(differences) - most} more" if len(differences) > most else "")
