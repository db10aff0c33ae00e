"""Control vectors for llama.cpp.

llama.cpp adds the tensor `direction.N` to the output of decoder block N (0-based), at every
position of every request. N starts at 1: block 0 cannot be steered.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cmrm.errors import InputError, MissingExtraError
from cmrm.files import atomic_path

ARCHITECTURE = "controlvector"
"""Value of `general.architecture` in a file of control vectors."""


def write_control_vector(
    path: Path, additions: torch.Tensor, architecture: str, *, record: Mapping[str, Any]
) -> float:
    """Write a GGUF file with what is added to each decoder block's output.

    Args:
        path: file that is written.
        additions: float32 [L, d]; row 0 is left out, since llama.cpp has no place for it.
        architecture: `model_type` of the text backbone, as a hint.
        record: what was exported, as text under `cmrm.NAME`.

    Returns:
        The share of the sum of the layers' norms that row 0 has, 0..1.

    Raises:
        InputError: nothing would be left, or the file cannot be written.
        MissingExtraError: gguf is not installed.
    """
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise MissingExtraError(
            "a control vector needs gguf; pip install 'cmrm[gguf]' brings it"
        ) from None

    norms = additions.norm(dim=-1)
    total = float(norms.sum())
    if float(norms[1:].sum()) == 0:
        raise InputError(
            "nothing is added above decoder layer 0, and llama.cpp steers from layer 1 on"
        )
    try:
        with atomic_path(path) as part:
            writer = GGUFWriter(str(part), ARCHITECTURE)
            writer.add_string(f"{ARCHITECTURE}.model_hint", architecture)
            writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(additions) - 1)
            for name, value in record.items():
                if value is not None:
                    writer.add_string(f"cmrm.{name}", str(value))
            for layer in range(1, len(additions)):
                values = additions[layer].float().contiguous().numpy()
                writer.add_tensor(f"direction.{layer}", values)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}") from None
    return float(norms[0]) / total
