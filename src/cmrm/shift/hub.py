"""Shift artifacts on the Hugging Face hub: one repository with the artifact and a generated card."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from cmrm.errors import ArtifactError

if TYPE_CHECKING:
    from cmrm.shift.artifact import ShiftVectors

FILE_NAME = "shift.safetensors"


def card(shift: ShiftVectors, *, repo_id: str | None = None) -> str:
    """README.md of a hub repository: YAML header, what the artifact is, provenance, recommended use, limits."""
    from huggingface_hub import ModelCardData

    held, use = shift.provenance, shift.recommended
    on_hub = held.model_id.count("/") == 1 and not Path(held.model_id).exists()
    header = ModelCardData(
        library_name="cmrm",
        tags=["cmrm", "activation-steering", "safety", "vision-language-model"],
        base_model=held.model_id if on_hub else None,
    )
    layers = "all" if use.layers is None else ", ".join(map(str, use.layers))
    source = repo_id or "FOLDER"
    return f"""---
{header.to_yaml()}
---

# Shift vectors for {held.model_id if on_hub else Path(held.model_id).name}

Dataset-level CMRM shift (Liu et al., arXiv 2410.09047): text-only minus corrupted-image state of the residual stream at the
last prompt token, per decoder layer. Added back at inference on inputs that contain an image, it restores refusals which
the model gives as text. It was not trained, and it fits this model alone; loading it on another one is refused.

```python
from cmrm import ShiftVectors, generate, load_vlm

vlm = load_vlm("{held.model_id}")
shift = ShiftVectors.from_pretrained("{source}")
replies = generate(vlm, samples, shift=shift)
```

| | |
|---|---|
| model | {held.model_id}{f" at {held.revision}" if held.revision else ""} ({held.architecture}) |
| layers x width | {held.n_layers} x {held.hidden_size} |
| anchors | {held.n_anchors}, set hash {held.anchor_hash[:12]} |
| text condition, corruption, seed | {held.text_condition}, {held.corruption}, {held.seed} |
| estimator | {held.estimator} |
| norm, first to last layer | {held.norms[0]:.4g} to {held.norms[-1]:.4g} |
| explained ratio, lowest to highest | {min(held.explained_ratio):.2f} to {max(held.explained_ratio):.2f} |
| recommended | alpha {use.alpha}, {use.schedule}, positions {use.positions}, layers {layers}, norm kept: {use.preserve_norm} |
| versions | {", ".join(f"{k} {v}" for k, v in held.versions.items())} |

{held.licence_note} Measure unsafe rate, over-refusal and utility on your own data before you rely on it:
`cmrm diagnose {held.model_id} --data SET --shift {FILE_NAME}`.
"""


def push(shift: ShiftVectors, repo_id: str, *, private: bool, token: str | None, message: str) -> str:
    """Upload artifact and card; returns the commit's address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch:
        shift.save(Path(scratch) / FILE_NAME)
        (Path(scratch) / "README.md").write_text(card(shift, repo_id=repo_id), encoding="utf-8")
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(repo_id=repo_id, folder_path=scratch, commit_message=message)
        except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
            raise ArtifactError(f"cannot upload to {repo_id}: {str(error).strip().splitlines()[0]}") from error
    return str(commit.commit_url)


def fetch(source: str | Path, *, revision: str | None, token: str | None) -> Path:
    """Path of the artifact that `source` names: a file, a folder that holds one, or a hub repository (downloaded once)."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        return path / FILE_NAME
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(source), FILE_NAME, revision=revision, token=token))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, EntryNotFoundError, OSError) as error:
        raise ArtifactError(
            f"there is no shift artifact at {source}, neither on disk nor on the hub: {str(error).strip().splitlines()[0]}"
        ) from error
