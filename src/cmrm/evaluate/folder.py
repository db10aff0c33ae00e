"""The folder of a run: its files, and the one run that it is bound to."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cmrm.defenses import Defense, FitData
from cmrm.engines.base import Engine
from cmrm.errors import InputError
from cmrm.evaluate.defended import fitted_file
from cmrm.evaluate.plan import Plan
from cmrm.files import write_json
from cmrm.model.identity import public_name
from cmrm.prompts import Loaded
from cmrm.prompts.splits import set_hash

_LABELS = {
    "identity": "the model's weights, config, processor or chat template",
    "generation": "its generation settings",
    "versions": "versions of cmrm, torch or transformers",
}
"""How messages name what differs, where the key does not say it."""


class Folder:
    """Paths of a run below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.plan = root / "plan.json"
        self.logs = root / "logs"
        self.fitted = root / "fitted"
        self.replies = root / "replies.db"
        self.fluency = root / "fluency.db"
        self.results = root / "results.json"

    def bind(self, plan: Plan, engine: Engine) -> bool:
        """Bind the folder to a run, and return whether it was free.

        A bound folder takes further sets and defences of the same run.

        Raises:
            InputError: it is bound to another model, other samples, anchors or settings, or its
                `plan.json` is damaged.
        """
        binding = _binding(plan, engine)
        if not self.plan.exists():
            write_json(self.plan, binding)
            return True
        earlier = self._different(binding)
        for name in ("sets", "settings"):
            binding[name] = {**earlier[name], **binding[name]}
        binding["anchors"] = binding["anchors"] or earlier["anchors"]
        write_json(self.plan, binding)
        return False

    def _different(self, binding: Mapping[str, Any]) -> dict[str, Any]:
        """What the folder is bound to; an `InputError` where a binding is another one."""
        try:
            earlier: dict[str, Any] = json.loads(self.plan.read_text(encoding="utf-8"))
            different = _differences(earlier, binding)
        except (OSError, ValueError, TypeError, AttributeError):
            raise InputError(
                f"{self.plan} is damaged; choose another --out, or remove {self.root}"
            ) from None
        if different:
            raise InputError(
                f"{self.root} holds another run ({', '.join(different)} differ); choose another "
                "--out, or remove it"
            )
        return earlier

    def check(self, plan: Plan, engine: Engine) -> None:
        """Refuse a folder of another run, as `bind` does; nothing is written.

        Raises:
            InputError: it is bound to another run.
        """
        if self.plan.exists():
            self._different(_binding(plan, engine))

    def renew(self, plan: Plan, names: Sequence[str]) -> None:
        """Let rows whose settings were searched again have other ones than before: what was fitted
        and logged for the earlier ones goes, replies stay.

        `names`: of those rows.
        """
        if not self.plan.exists():
            return
        stored = json.loads(self.plan.read_text(encoding="utf-8"))
        for part in plan.parts():
            settings = json.loads(json.dumps(_settings(plan, part), default=str))
            if part.name in names and stored["settings"].get(part.name, settings) != settings:
                del stored["settings"][part.name]
                fitted_file(self.fitted, part).unlink(missing_ok=True)
                shutil.rmtree(self.logs / part.name, ignore_errors=True)
        write_json(self.plan, stored)

    def release(self) -> None:
        """Make a folder free again in which nothing was generated."""
        shutil.rmtree(self.fitted, ignore_errors=True)
        self.plan.unlink(missing_ok=True)


def _binding(plan: Plan, engine: Engine) -> dict[str, Any]:
    binding: dict[str, Any] = {
        **engine.context(), "model": public_name(plan.model),
        "max_new_tokens": plan.max_new_tokens, "seed": plan.seed, "batch_size": plan.batch_size,
        "anchors": _anchor_hash(plan.anchors),
        "settings": {part.name: _settings(plan, part) for part in plan.parts()},
        "sets": {loaded.name: _set_digest(loaded) for loaded in plan.sets},
    }  # fmt: skip
    whole: dict[str, Any] = json.loads(json.dumps(binding, default=str))
    return whole


def _settings(plan: Plan, part: Defense) -> dict[str, Any]:
    """A defence's settings, and the vectors that it takes from the plan."""
    if plan.shift is None or not plan.takes_shift(part):
        return part.settings
    return {**part.settings, "vectors": _hash(plan.shift.vectors.tolist())}


def _differences(earlier: Mapping[str, Any], binding: Mapping[str, Any]) -> list[str]:
    """What of a binding is not as it was; the model's name is not compared, its identity is."""
    different = [
        _LABELS.get(name, name) for name, value in binding.items()
        if name not in ("model", "anchors", "sets", "settings") and earlier.get(name) != value
    ]  # fmt: skip
    if binding["anchors"] and earlier["anchors"] not in (None, binding["anchors"]):
        different.append("anchors")
    different += [
        name for name, value in binding["sets"].items()
        if earlier["sets"].get(name, value) != value
    ]  # fmt: skip
    different += [
        f"settings of {name}" for name, value in binding["settings"].items()
        if earlier["settings"].get(name, value) != value
    ]  # fmt: skip
    return different


def _set_digest(loaded: Loaded) -> str:
    """Hex sha256 of what is asked, and of everything that decides how a reply is measured."""
    rows = sorted(
        [s.id, s.label, s.category, s.caption, s.answer, s.match, s.context, s.image_last]
        for s in loaded.samples
    )
    return _hash([set_hash(loaded.samples), rows])


def _anchor_hash(anchors: FitData | None) -> str | None:
    if anchors is None:
        return None
    sides = {"h": anchors.harmful, "b": anchors.benign, "m": anchors.more}
    return set_hash(
        replace(sample, id=f"{side}:{sample.id}")
        for side, samples in sides.items()
        for sample in samples
    )


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
