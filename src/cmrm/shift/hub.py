"""Shift artifacts on the Hugging Face hub: one repository with the artifact and a generated
card."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cmrm.errors import ArtifactError
from cmrm.shift.provenance import Provenance
from cmrm.steering.setting import Steering

FILE_NAME = "shift.safetensors"


def card(
    made: Provenance,
    use: Steering,
    *,
    repo_id: str | None = None,
    records: Mapping[str, Any] | None = None,
) -> str:
    """README.md of a hub repository: YAML header, what the artifact is, provenance, recommended
    use, limits.

    `records`: how well what was fitted on harmful and benign anchors does (`Artifact.records`).
    """
    from huggingface_hub import ModelCardData

    on_hub = made.model_id.count("/") == 1
    header = ModelCardData(
        library_name="cmrm",
        tags=["cmrm", "activation-steering", "safety", "vision-language-model"],
        base_model=made.model_id if on_hub else None,
    )
    layers = "all" if use.layers is None else ", ".join(map(str, use.layers))
    recommended = (
        f"operator {use.operator}, alpha {use.alpha}, {use.schedule}, positions {use.positions}, "
        f"layers {layers}, norm kept: {use.preserve_norm}, gate: {use.gate}"
    )
    if use.alpha == 0:
        recommended = "nothing: alpha 0, which leaves the model as it is"
    fitted = "".join(f"| {name} | {said} |\n" for name, said in _fitted(made, records or {}))
    explained = f"{min(made.explained_ratio):.2f} to {max(made.explained_ratio):.2f}"
    source = repo_id or "FOLDER"
    model = made.model_id if on_hub else "FOLDER_OF_THE_MODEL"
    return f"""---
{header.to_yaml()}
---

# Shift vectors for {made.model_id}

Dataset-level CMRM shift (Liu et al., arXiv 2410.09047): text-only minus corrupted-image state of
the residual stream at the last prompt token, per decoder layer. Added back at inference on inputs
that contain an image, it restores refusals which the model gives as text. It was not trained, and
it fits this model alone: other weights are refused.

```python
from cmrm import ShiftVectors, generate, load_vlm

vlm = load_vlm("{model}")
shift = ShiftVectors.from_pretrained("{source}")
replies = generate(vlm, samples, shift=shift)
```

| | |
|---|---|
| model | {made.model_id}{f" at {made.revision}" if made.revision else ""} ({made.architecture}) |
| layers x width | {made.n_layers} x {made.hidden_size} |
| anchors | {made.n_anchors}, set hash {made.anchor_hash[:12]} |
| text condition, corruption, seed | {made.text_condition}, {made.corruption}, {made.seed} |
| estimator | {made.estimator} |
| norm, first to last layer | {made.norms[0]:.4g} to {made.norms[-1]:.4g} |
| explained ratio, lowest to highest | {explained} |
{fitted}| recommended | {recommended} |
| versions | {", ".join(f"{k} {v}" for k, v in made.versions.items())} |

{made.licence_note} Measure unsafe rate, over-refusal and utility on your own data before you rely
on it:
`cmrm diagnose {model} --data SET --shift {FILE_NAME}`.
"""


def _fitted(made: Provenance, records: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Rows of the card's table on what was fitted with benign anchors; none without them."""
    if made.n_benign:
        yield "benign anchors", f"{made.n_benign}, set hash {made.benign_hash[:12]}"
        yield "fill", "the artifact holds the refusal direction: `Steering(operator='fill')`"
    if made.benign_share:
        yield "mixed anchors", f"{made.benign_share:.0%} of those of the shift are benign"
    if made.sequential_layers:
        yield "sequential vectors", f"decoder layers {', '.join(map(str, made.sequential_layers))}"
    gate, gap = records.get("gate"), records.get("gap")
    if gate is not None:
        yield (
            "harm gate",
            f"reads decoder layer {gate['layer']}, AUC {gate['auc'][gate['layer']]:.2f}, "
            f"{gate['false_alarms']:.0%} false alarms and {gate['recall']:.0%} recall on held-out "
            "anchors: `Steering(gate=True)`",
        )
    if gap is not None:
        yield (
            "refusal coordinate that the corrupted image takes",
            f"{gap['lost']:.0%} ({gap['low']:.0%} to {gap['high']:.0%})",
        )


def push(
    repo_id: str,
    save: Callable[[Path], object],
    text: str,
    *,
    private: bool,
    token: str | None,
    message: str,
) -> str:
    """Upload the artifact that `save` writes, and `text` as its card; returns the commit's address.

    Raises:
        ArtifactError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch:
        save(Path(scratch) / FILE_NAME)
        (Path(scratch) / "README.md").write_text(text, encoding="utf-8")
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(repo_id=repo_id, folder_path=scratch, commit_message=message)
        except (
            HfHubHTTPError,
            HFValidationError,
            LocalTokenNotFoundError,
            OfflineModeIsEnabled,
            OSError,
        ) as error:
            raise ArtifactError(
                f"cannot upload to {repo_id}: {str(error).strip().splitlines()[0]}"
            ) from error
    return str(commit.commit_url)


def fetch(source: str | Path, *, revision: str | None, token: str | None) -> Path:
    """Path of the artifact in a file, in a folder, or in a hub repository (downloaded once)."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        return path / FILE_NAME
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(hf_hub_download(str(source), FILE_NAME, revision=revision, token=token))
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        EntryNotFoundError,
        OSError,
    ) as error:
        raise ArtifactError(
            f"there is no artifact at {source}, neither on disk nor on the hub: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
