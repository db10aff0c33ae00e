"""What a run fits before it asks: one artifact a defence, fitted once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cmrm.defenses import Defense
from cmrm.defenses.cmrm import CmrmDataset
from cmrm.engines.base import Engine
from cmrm.errors import InputError
from cmrm.evaluate.defended import adopt, fitted_file
from cmrm.evaluate.plan import Plan


def fit_defenses(
    plan: Plan, engine: Engine, folder: Path, *, say: Callable[[str], None] = lambda text: None
) -> None:
    """Fit the plan's defences that need it into `folder`; those that lie there are checked.

    Raises:
        InputError: there are no anchors.
        ArtifactError: what lies there, or the plan's shift, belongs to another model.
    """
    if plan.shift is not None:
        engine.accept(plan.shift)
    fitted: dict[tuple[type[Defense], object], Defense] = {}
    for defense in plan.parts():
        if not defense.needs_fit:
            continue
        path = fitted_file(folder, defense)
        if path.exists():
            defense.load(path, engine)
            continue
        alike = fitted.get((type(defense), defense.fitted_by))
        if plan.shift is not None and isinstance(defense, CmrmDataset):
            adopt(defense, plan.shift)
        elif alike is not None:
            defense.state, defense.gate, defense.records = alike.state, alike.gate, alike.records
        elif plan.anchors is None:
            shift = ", or pass its vectors (--shift)" if isinstance(defense, CmrmDataset) else ""
            raise InputError(
                f"the defence {defense.name!r} has to be fitted: name its anchors (--anchors, "
                f"--benign-anchors){shift}"
            )
        else:
            say(f"fitting {defense.name}")
            defense.fit(engine, plan.anchors)
        if defense.fitted_by is not None:
            fitted[type(defense), defense.fitted_by] = defense
        defense.save(path, engine)
