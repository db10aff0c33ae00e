"""Weights of a model: sampled values, checksums and adapters, read where the tensors are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

SAMPLES = 32
"""Values of each tensor that are stored, evenly spaced over the flattened tensor."""

ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Largest relative error of rounding a number to a dtype."""

LEAST = 1e-6
"""Differences of two values below this, relative to the tensor's largest sampled value, are
rounding."""

CHUNK = 1 << 20
"""Words of 8 bytes that are summed at a time."""


@dataclass(frozen=True, eq=False)
class Weights:
    """Sampled values and checksums of a model's tensors."""

    names: tuple[str, ...]
    """Of parameters and persistent buffers; wrappers' prefixes are removed."""
    kinds: tuple[str, ...]
    """dtype of each (`float32`), or the class of a quantised tensor; `meta` where it is
    offloaded."""
    checksums: tuple[str, ...]
    """16 hex digits over all bytes; empty where the tensor cannot be read."""
    samples: torch.Tensor
    """float32 [N, SAMPLES], 0 where the tensor cannot be read."""

    def differences(self, other: Weights) -> list[str]:
        """Names of tensors that are not the same weights; see the module."""
        places = {name: k for k, name in enumerate(other.names)}
        different = []
        for k, name in enumerate(self.names):
            m = places.get(name)
            if m is None:
                if is_adapter(name):
                    different.append(name)
                continue
            if not self.checksums[k] or not other.checksums[m]:
                continue
            if self.kinds[k] == other.kinds[m]:
                same = self.checksums[k] == other.checksums[m]
            else:
                same = alike(self.samples[k], self.kinds[k], other.samples[m], other.kinds[m])
            if not same:
                different.append(name)
        different += [
            name for name in other.names if is_adapter(name) and name not in set(self.names)
        ]
        return different


def tensors_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers that take part in a pass, under the names that they have
    without PEFT."""
    silent = _silent_adapters(model)
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        own = [*module.named_parameters(recurse=False)]
        own += [
            (name, buffer) for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set and buffer.is_floating_point()
        ]  # fmt: skip
        for name, tensor in own:
            whole = f"{prefix}.{name}" if prefix else name
            if id(tensor) in seen or any(whole.startswith(start) for start in silent):
                continue
            seen.add(id(tensor))
            yield whole.replace(".base_layer.", "."), tensor


def is_adapter(name: str) -> bool:
    """Whether a tensor's name is that of an adapter (PEFT's LoRA and its kin)."""
    return "lora_" in name or "adapter" in name or ".ia3_" in name or ".oft_" in name


def _silent_adapters(model: nn.Module) -> list[str]:
    """Beginnings of the names of adapters that change nothing: switched off, merged, or with zero
    effect."""
    silent = []
    for prefix, module in model.named_modules():
        if not (hasattr(module, "merged_adapters") and hasattr(module, "disable_adapters")):
            continue
        active = set() if module.disable_adapters else set(module.active_adapters)
        parts: dict[str, list[tuple[str, torch.Tensor]]] = {}
        for name, tensor in module.named_parameters():
            if name.startswith("base_layer."):
                continue
            kind, _, rest = name.partition(".")
            parts.setdefault(rest.partition(".")[0], []).append((kind, tensor))
        for adapter, tensors in parts.items():
            zero = any(kind == "lora_B" and not bool(tensor.any()) for kind, tensor in tensors)
            if adapter not in active or adapter in module.merged_adapters or zero:
                silent += [f"{prefix}.{kind}.{adapter}" for kind, _ in tensors]
    return silent


def kind_of(tensor: torch.Tensor) -> str:
    """dtype of a tensor (`float32`), its class where it is quantised, `meta` where offloaded."""
    if tensor.device.type == "meta":
        return "meta"
    data = tensor.data
    if type(data) is not torch.Tensor:
        return type(data).__name__
    quantised = type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer)
    return type(tensor).__name__ if quantised else str(data.dtype).removeprefix("torch.")


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether the numbers of a tensor can be read as they are."""
    return (
        kind_of(tensor) == str(tensor.dtype).removeprefix("torch.") and tensor.is_floating_point()
    )


def sample_of(tensor: torch.Tensor) -> torch.Tensor:
    """`SAMPLES` values, evenly spaced over the flattened tensor; 0 where it cannot be read."""
    if not is_readable(tensor) or not tensor.numel():
        return torch.zeros(SAMPLES)
    flat = tensor.detach().reshape(-1)
    return flat[_places(flat.shape[0], flat.device)]


@lru_cache(maxsize=4096)
def _places(size: int, device: torch.device) -> torch.Tensor:
    return torch.tensor([k * (size - 1) // (SAMPLES - 1) for k in range(SAMPLES)], device=device)


_MULTIPLIERS: dict[torch.device, torch.Tensor] = {}


def checksum(tensor: torch.Tensor) -> str:
    """16 hex digits over all bytes of a tensor: a weighted sum modulo 2^64, computed where the
    tensor lies.

    It tells trainings apart and is no protection against somebody who wants two tensors to look
    alike.
    """
    words, rest = _words(tensor)
    if words.device not in _MULTIPLIERS:
        generator = torch.Generator().manual_seed(20241112)
        odd = torch.randint(-(2**62), 2**62, (CHUNK,), generator=generator) * 2 + 1
        _MULTIPLIERS[words.device] = odd.to(words.device)
    multipliers = _MULTIPLIERS[words.device]
    sums = [(part * multipliers[: len(part)]).sum() for part in torch.split(words, CHUNK)]
    total = int.from_bytes(rest, "little") + tensor.numel()
    for value in torch.stack(sums).tolist() if sums else []:
        total = (total * 0x9E3779B97F4A7C15 + value) % 2**64
    return f"{total:016x}"


def _words(tensor: torch.Tensor) -> tuple[torch.Tensor, bytes]:
    """All bytes of a tensor as int64 words, and the last bytes that fill no word."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    whole = len(flat) // 8 * 8
    return flat[:whole].view(torch.int64), bytes(flat[whole:].tolist())


def sum_of(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor's words modulo 2^64, int64 []: it takes a single reading of the weights."""
    if not is_readable(tensor) or not tensor.numel():
        return torch.zeros((), dtype=torch.int64)
    words, rest = _words(tensor)
    return words.sum() + int.from_bytes(rest, "little", signed=True) if rest else words.sum()


def alike(a: torch.Tensor, a_kind: str, b: torch.Tensor, b_kind: str) -> bool:
    """Whether two sets of sampled values are the same numbers, rounded to their dtypes."""
    rounding = sum(ROUNDING.get(kind, 2.0**-3) for kind in (a_kind, b_kind))
    scale = torch.maximum(a.abs(), b.abs())
    return bool(((a - b).abs() <= 1.01 * rounding * scale + LEAST * scale.max()).all())


def address_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Memory address and version counter of a tensor; 0 where it has none."""
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # quantised and meta tensors may have none
        address = 0
    return address, 0 if tensor.is_inference() else tensor._version
