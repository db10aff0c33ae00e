"""Sets by the names that `cmrm evaluate` takes, the demo's own test split among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cmrm.demo import DEMO
from cmrm.prompts.ours.samples import prompt_samples, vqa_samples
from cmrm.demo.settings import QUICK
from cmrm.prompts import NAMED, Loaded, load_samples


def load_named(
    name: str, places: Mapping[str, Path], *, limit: int | None, seed: int = 0, partial: bool = False
) -> Loaded:
    """The set that `name` names: `demo`, a named set (`xstest`), one of its variants (`xstest-safe`), or a file.

    Args:
        name: see above.
        places: name, with or without variant -> where the set lies; `CMRM_DATA` is looked at otherwise (`sets.named.place_of`).
        limit: draw so many samples by hashed id (demo: of each kind).
        seed: of sets that are composed by a recipe.
        partial: take a set whose count or checksums are not the published ones.

    Raises:
        InputError: the set cannot be used.
    """
    if name == DEMO:
        return demo_set(limit)
    source, variant = name, None
    if name not in NAMED and not Path(name).exists():
        for known in sorted(NAMED, key=len, reverse=True):
            if name.startswith(f"{known}-"):
                source, variant = known, name.removeprefix(f"{known}-")
                break
    loaded = load_samples(
        source, path=places.get(name, places.get(source)), variant=variant, limit=limit, seed=seed, partial=partial
    )
    return replace(loaded, name=Path(name).stem if Path(name).exists() else name)


def demo_set(limit: int | None = None) -> Loaded:
    """The demo's test split: harmful requests, benign look-alikes and visual questions, all with images; `limit` of each kind, stratified by category; as many as `cmrm demo` takes where None."""
    each = QUICK.per_category if limit is None else max(1, limit // 12)
    harmful = prompt_samples("test", "harmful", per_category=each)[:limit]
    benign = prompt_samples("test", "benign", per_category=each)[:limit]
    asked = vqa_samples("test", n=QUICK.vqa if limit is None else limit)
    questions = [replace(sample, answer=answer, label=None) for sample, answer in asked]
    return Loaded("demo", (*harmful, *benign, *questions), harm="text")
