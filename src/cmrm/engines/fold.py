"""Constant additions folded into a checkpoint: the bias of each decoder block's last projection.

In a Llama-type backbone the output of decoder block l is

    h + down_proj(silu(gate_proj x) * up_proj x),

and a bias b_l of `down_proj` adds b_l to it at every position: h_l <- h_l + b_l. So a checkpoint
with `mlp_bias: true`, gate and up biases of zero and b_l = alpha delta_l steers in any engine that
reads it, without a hook. It cannot look at the request: text-only input is steered too, and every
position is.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cmrm.errors import InputError, ModelError
from cmrm.files import atomic_path, write_json
from cmrm.shift.artifact import ShiftVectors
from cmrm.shift.resolve import resolved, settled
from cmrm.steering.intervention import Intervention, in_dtype
from cmrm.steering.setting import Steering, layer_ranges

INDEX = "model.safetensors.index.json"
"""File that says which tensor is in which file."""
SINGLE = "model.safetensors"
"""The one file of a small checkpoint."""
BIASES = "model-cmrm-bias.safetensors"
"""File of the added tensors."""
RECORD = "cmrm_fold.json"
"""File that says what was folded."""
FAMILIES = ("llama",)
"""Text backbones (`model_type`) whose MLP has a bias that transformers and vLLM read."""
_DOWN = re.compile(r"^(.*\blayers\.)(\d+)(\.mlp\.)down_proj\.weight$")


@dataclass(frozen=True)
class _Tensor:
    """A stored tensor, without its values."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def constant_additions(shift: ShiftVectors, steering: Steering | None = None) -> torch.Tensor:
    """What a setting adds to the output of every decoder block, float32 [L, d].

    Args:
        shift: the artifact.
        steering: the setting; the recommended one when None.

    Raises:
        InputError: the setting is not the same addition at every position of every request.
    """
    steering = settled(shift, steering)
    reason = not_constant(steering)
    if reason is not None:
        raise InputError(f"this setting cannot be folded: {reason}")
    added = torch.zeros_like(shift.vectors, dtype=torch.float32)
    for intervention in resolved(shift, steering):
        _add(intervention, added)
    return added


def not_constant(steering: Steering) -> str | None:
    """Why a setting is no constant addition at every position; None where it is one."""
    if steering.operator != "add":
        return f"{steering.operator} looks at each request's state, a bias adds the same to all"
    if steering.gate:
        return "a gate looks at each request, a bias steers all of them"
    if steering.preserve_norm:
        return "preserve_norm rescales each state, a bias only adds"
    if steering.positions != "all":
        return (
            f"it steers the positions {steering.positions}, a bias steers every position; choose "
            "positions all, and measure it so"
        )
    return None


def _add(intervention: Intervention, added: torch.Tensor) -> None:
    for edit in intervention.edits:
        assert edit.operator == "add"
        assert edit.vector.dim() == 1
        added[edit.layer] += edit.strength * edit.vector.float()


def fold(folder: Path, additions: torch.Tensor, out: Path, *, record: Mapping[str, Any]) -> Path:
    """Write a copy of a checkpoint that adds `additions` in every forward pass.

    The original tensors are copied byte for byte, under their names; biases are added beside them,
    in the dtype of the weights. Everything else is copied but for `config.json`, the index and
    the card.

    Args:
        folder: checkpoint in safetensors, as on the hub.
        additions: float32 [L, d], added to the output of decoder block l (0-based).
        out: folder that is written; it may not exist yet, or is empty.
        record: what was folded, for the card and `cmrm_fold.json`.

    Returns:
        `out`.

    Raises:
        InputError: `out` is not free, there is too little space, or the weights' dtype does not
            hold an addition.
        ModelError: the backbone has no such bias, or the checkpoint is quantised, incomplete or
            without safetensors.
    """
    config = _config(folder)
    tensors = _tensors(folder)
    names = _projections(tensors, additions, folder)
    _check_target(out, folder)
    biases = dict(_biases(names, tensors, additions))
    try:
        with atomic_path(out) as part:
            part.mkdir(parents=True, exist_ok=True)
            files = _copy(folder, part)
            save_file(biases, part / BIASES, metadata={"format": "pt"})
            _write_index(part, tensors, files, biases)
            text = config.get("text_config", config)
            text["mlp_bias"] = True
            write_json(part / "config.json", config)
            write_json(part / RECORD, dict(record))
            (part / "README.md").write_text(_card(record, additions), encoding="utf-8")
            _verify(part)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error}") from None
    return out


def _config(folder: Path) -> dict[str, Any]:
    """The checkpoint's config, refused where its backbone has no bias to fold into.

    Raises:
        ModelError: it is missing or damaged, quantised, or of another family.
    """
    from transformers import AutoConfig

    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = AutoConfig.from_pretrained(folder).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{folder} holds no config that can be read: {reason}") from None
    if text.model_type not in FAMILIES:
        raise ModelError(
            f"the text backbone is {text.model_type}; its MLP has no bias that could hold the "
            f"vectors. {', '.join(FAMILIES)} has one; use `cmrm serve`, or hooks"
        )
    if config.get("quantization_config") or getattr(text, "quantization_config", None):
        raise ModelError("the checkpoint is quantised; fold the original one, then quantise it")
    if getattr(text, "mlp_bias", False):
        raise ModelError("the checkpoint has MLP biases already (mlp_bias); fold the original one")
    return config


def _tensors(folder: Path) -> dict[str, _Tensor]:
    """Every stored tensor by its name.

    Raises:
        ModelError: there are no safetensors, or a file is damaged or missing.
    """
    index = folder / INDEX
    try:
        if index.is_file():
            mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(mapping.values()))
        elif (folder / SINGLE).is_file():
            files = [SINGLE]
        else:
            raise ModelError(f"{folder} holds no safetensors ({SINGLE} or {INDEX})")
        tensors: dict[str, _Tensor] = {}
        for name in files:
            with safe_open(folder / name, framework="pt") as stored:
                for key in stored.keys():  # noqa: SIM118  a handle is no mapping
                    part = stored.get_slice(key)
                    dtype = getattr(torch, _DTYPES.get(part.get_dtype(), ""), torch.int8)
                    tensors[key] = _Tensor(name, tuple(part.get_shape()), dtype)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"the checkpoint in {folder} is not whole: {reason}") from None
    return tensors


_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Names of dtypes in safetensors, and in torch."""


def _projections(
    tensors: Mapping[str, _Tensor], additions: torch.Tensor, folder: Path
) -> list[tuple[str, str]]:
    """(beginning, end) of the names of each decoder block's MLP, by layer.

    Raises:
        ModelError: not exactly one stack of blocks has the additions' shape.
    """
    n_layers, width = additions.shape
    stacks: dict[str, dict[int, str]] = {}
    for name, tensor in tensors.items():
        match = _DOWN.match(name)
        if match is not None and tensor.shape[0] == width:
            stacks.setdefault(match[1], {})[int(match[2])] = match[3]
    whole = {
        prefix: layers for prefix, layers in stacks.items() if sorted(layers) == [*range(n_layers)]
    }
    if len(whole) != 1:
        raise ModelError(
            f"{folder} has {len(whole)} stacks of {n_layers} decoder blocks with a down_proj of "
            f"width {width}; expected one"
        )
    prefix, layers = next(iter(whole.items()))
    names = [(f"{prefix}{layer}", layers[layer]) for layer in range(n_layers)]
    if any(tensors[f"{a}{b}down_proj.weight"].dtype == torch.int8 for a, b in names):
        raise ModelError("the checkpoint is quantised; fold the original one, then quantise it")
    return names


def _biases(
    names: Sequence[tuple[str, str]], tensors: Mapping[str, _Tensor], additions: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """Biases of every block: zero but for those of `down_proj`."""
    for layer, ((start, end), addition) in enumerate(zip(names, additions, strict=True)):
        for part in ("gate_proj", "up_proj", "down_proj"):
            weight = tensors[f"{start}{end}{part}.weight"]
            bias = torch.zeros(weight.shape[0], dtype=weight.dtype)
            if part == "down_proj":
                bias = in_dtype(addition, layer, weight.dtype)
            yield f"{start}{end}{part}.bias", bias.contiguous()


def _check_target(out: Path, folder: Path) -> None:
    """Raises `InputError` where `out` is not free, or there is too little space."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty; name a folder that does not exist yet")
    place = out.resolve().parent
    while not place.exists():
        place = place.parent
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    free = shutil.disk_usage(place).free
    if free < 1.05 * size:
        raise InputError(
            f"the folded checkpoint takes {size / 1e9:.1f} GB, and {place} has {free / 1e9:.1f} GB "
            "left"
        )


def _verify(part: Path) -> None:
    """Raises `ModelError` where the new config does not ask for the biases."""
    from transformers import AutoConfig

    if not getattr(AutoConfig.from_pretrained(part).get_text_config(), "mlp_bias", False):
        raise ModelError(
            "the checkpoint's config has no place for mlp_bias (no text_config); its biases would "
            "be ignored"
        )


def _copy(folder: Path, part: Path) -> dict[str, str]:
    """Copy the checkpoint; old -> new names of its files of tensors.

    A file that is called `model.safetensors` would hide the index, and gets another name. Weights
    of other formats are left out: they have no biases.
    """
    renamed = {SINGLE: "model-00001-of-00001.safetensors"}
    others = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")
    for file in sorted(folder.iterdir()):
        if file.is_dir() and not file.name.startswith("."):
            shutil.copytree(file, part / file.name)
        skipped = file.name in (INDEX, "config.json", "README.md", "checksums.json")
        if not file.is_file() or skipped or file.suffix in others:
            continue
        shutil.copyfile(file, part / renamed.get(file.name, file.name))
    return renamed


def _write_index(
    part: Path, tensors: Mapping[str, _Tensor], files: Mapping[str, str],
    biases: Mapping[str, torch.Tensor],
) -> None:  # fmt: skip
    mapping = {name: files.get(tensor.file, tensor.file) for name, tensor in tensors.items()}
    mapping |= dict.fromkeys(biases, BIASES)
    size = sum((part / name).stat().st_size for name in set(mapping.values()))
    write_json(part / INDEX, {"metadata": {"total_size": size}, "weight_map": mapping})


def _card(record: Mapping[str, Any], additions: torch.Tensor) -> str:
    """README.md of the folded checkpoint: what it does, and what it was made of."""
    norms = additions.norm(dim=-1)
    steered = tuple(norms.nonzero().flatten().tolist())
    base = str(record.get("model", ""))
    header = f"base_model: {base}\n" if base.count("/") == 1 else ""
    rows = "".join(f"| {name.replace('_', ' ')} | {value} |\n" for name, value in record.items())
    largest = float(norms.max()) if len(norms) else 0.0
    return f"""---
library_name: transformers
tags: [cmrm, activation-steering, safety, vision-language-model]
{header}---

# {base or "A checkpoint"} with folded shift vectors

A CMRM shift (Liu et al., arXiv 2410.09047) is folded into the biases of `mlp.down_proj`: the output
of the decoder blocks {layer_ranges(steered) if steered else "(none)"} (0-based) is moved by a
constant, in any engine that reads this checkpoint. The original tensors are
unchanged; biases stand beside them in `{BIASES}`.

**It steers everything.** A bias cannot see whether a request has an image: text-only requests are
steered too, and every position of prompt and reply is. Measure unsafe rate, over-refusal and
utility on text and on images before you rely on it.

| | |
|---|---|
{rows}| largest addition (norm) | {largest:.4g} |
"""
