"""What an image costs a model on a set: rates by condition, and the shift of its states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cmrm.defenses import Defense, make_defense
from cmrm.defenses.cmrm import CmrmDataset
from cmrm.engines.base import Decoding
from cmrm.engines.transformers import TransformersEngine
from cmrm.errors import InputError
from cmrm.judges import DEFAULT_JUDGE, Judge, make_judge
from cmrm.measure.environment import machine_info, model_info, shift_info, versions_info
from cmrm.measure.examples import examples_of
from cmrm.measure.geometry import Compass, compare_shifts, represent
from cmrm.measure.loop import Answering, measure_cell
from cmrm.measure.outcomes import Cell
from cmrm.measure.schema import checked
from cmrm.measure.store import ReplyStore
from cmrm.measure.table import results_of
from cmrm.prompts import Loaded, refuse_unratable
from cmrm.prompts.conditions import CORRUPTED, FIVE, Condition
from cmrm.prompts.labels import LABELS
from cmrm.prompts.sample import Sample
from cmrm.shift.artifact import ShiftVectors
from cmrm.steering.setting import Steering


def possible_conditions(samples: Sequence[Sample]) -> tuple[list[Condition], dict[str, str]]:
    """The paper's conditions that every sample can be put under; for the others the reason."""
    without_image = sum(sample.image is None for sample in samples)
    without_caption = sum(not sample.caption for sample in samples)
    possible, left_out = [], {}
    for condition in FIVE:
        if condition.has_image and without_image:
            left_out[condition.value] = f"{without_image} of {len(samples)} samples have no image"
        elif condition is Condition.CAPTION and without_caption:
            left_out[condition.value] = (
                f"{without_caption} of {len(samples)} samples have no caption"
            )
        else:
            possible.append(condition)
    return possible, left_out


def corruptions_named(names: str | None) -> list[Condition]:
    """`all`, or a comma list of corruptions, as conditions; empty for None.

    Raises:
        InputError: a name is no corruption.
    """
    if not names:
        return []
    if names == "all":
        return list(CORRUPTED)
    listed = [name.strip() for name in names.split(",")]
    wrong = [name for name in listed if name not in CORRUPTED]
    if wrong:
        known = ", ".join(CORRUPTED)
        raise InputError(f"unknown corruption {', '.join(wrong)}; one of {known}, or all")
    return [Condition(name) for name in listed]


def steered_by(shift: ShiftVectors, steering: Steering | None = None) -> Defense:
    """CMRM at dataset level with an artifact's vectors; its recommended setting when None."""
    defense = CmrmDataset(**(steering or shift.recommended).to_json())
    defense.use(shift)
    return defense


def diagnose(
    engine: TransformersEngine,
    loaded: Loaded,
    *,
    judges: Mapping[str, Judge] | None = None,
    corruptions: Sequence[Condition] = (),
    shift: ShiftVectors | None = None,
    steering: Steering | None = None,
    store: ReplyStore | None = None,
    name: str | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 48,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
    tick: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """Rates and shift of one model on one set, in the form of `measure.schema.Results`.

    Harmful samples count towards `unsafe`, benign ones towards `over_refusal`, those with an answer
    towards `accuracy`.

    Args:
        engine: where the model runs.
        loaded: the set.
        judges: by name; the default judge when None.
        corruptions: further corrupted images; each one's mean shift is compared with blank's.
        shift: the original condition is also run steered by these vectors.
        steering: their setting; the recommended one when None.
        store: keeps replies, so that a run that was killed continues.
        name: of the model in the results; its hub id or folder when None.
        batch_size: prompts a batch.
        max_new_tokens: length limit of a reply.
        seed: seed of noise, shuffles, donors and the bootstrap.
        say: called with a line on what is being done.
        tick: called with the number of prompts that were finished.

    Raises:
        InputError: fewer than two samples, none that a rate can come from, or corruptions of
            samples without images. ArtifactError: vectors of another model.
    """
    refuse_unratable(loaded)
    samples = loaded.samples
    if len(samples) < 2:
        raise InputError(f"{loaded.name} has {len(samples)} sample; a diagnosis needs at least 2")
    conditions, left_out = possible_conditions(samples)
    if (corruptions or shift is not None) and Condition.BLANK not in conditions:
        reason = left_out["blank"]
        raise InputError(f"{loaded.name}: {reason}; corruptions and steering are about images")
    if shift is not None:
        engine.accept(shift)
    judges = judges if judges is not None else {DEFAULT_JUDGE: make_judge(DEFAULT_JUDGE)}
    shown = list(dict.fromkeys([*conditions, *corruptions]))
    runs: list[tuple[Condition, Defense]] = [(c, make_defense("none")) for c in shown]
    if shift is not None:
        runs.append((Condition.ORIGINAL, steered_by(shift, steering)))
    cells: list[Cell] = []
    for condition, defense in runs:
        say(f"replies: {condition.value}, {defense.name}")
        defense.check(engine)
        answering = Answering(engine, defense, Decoding(max_new_tokens), store)
        cells.append(
            measure_cell(
                answering, samples, judges, name=loaded.name, condition=condition, harm=loaded.harm,
                batch_size=batch_size, seed=seed, on_batch=tick,
            )
        )  # fmt: skip
    say("states")
    compass = Compass() if shift is None else Compass(shift.direction, shift.gate)
    states = represent(
        engine, samples, shown, batch_size=batch_size, seed=seed, on_batch=tick, compass=compass,
        defenses=[defense for _, defense in runs if defense.name != "none"], drawing=True,
    )  # fmt: skip
    geometry = states.to_geometry(engine)
    if corruptions:
        compared = dict.fromkeys([Condition.BLANK, *corruptions])
        shifts = {condition.value: states.mean_shift(condition.value) for condition in compared}
        geometry["corruptions"] = compare_shifts(shifts, "blank")
    settings = {
        "max_new_tokens": max_new_tokens, "batch_size": batch_size, "decoding": "greedy",
        "judges": list(judges),
        "corruptions": [condition.value for condition in corruptions],
        "steering": None if shift is None else (steering or shift.recommended).to_json(),
    }  # fmt: skip
    return checked({
        **results_of(cells, seed=seed),
        "kind": "diagnosis",
        "model": model_info(engine, name),
        "sets": [_data(loaded)],
        "settings": settings,
        "seed": seed,
        "versions": versions_info(),
        "machine": machine_info(),
        "examples": examples_of(cells),
        "geometry": geometry,
        "left_out": left_out,
        "shift": None if shift is None else shift_info(shift),
    })  # fmt: skip


def _data(loaded: Loaded) -> dict[str, Any]:
    """The set, with a note on samples that are in no rate."""
    data = loaded.to_json()
    unrated = [s for s in loaded.samples if s.label not in LABELS and s.answer is None]
    if unrated:
        data["notes"].append(
            f"{len(unrated)} of {len(loaded.samples)} samples are labelled neither harmful nor "
            "benign: they are in no rate"
        )
    return data


def passes(loaded: Loaded, corruptions: Sequence[Condition], *, steered: bool) -> int:
    """Prompts that one diagnosis passes through the model, for its progress bar."""
    shown = len(dict.fromkeys([*possible_conditions(loaded.samples)[0], *corruptions]))
    return 2 * len(loaded.samples) * (shown + steered)
