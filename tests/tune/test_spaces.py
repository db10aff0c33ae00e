"""Every defence says what can be tuned, and is built from any point of it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from cmrm.defenses import FitData, defense_names, make_defense, respond
from cmrm.defenses.space import Choice, LayerRange, Real, Whole
from cmrm.engines.base import Decoding
from cmrm.engines.transformers import TransformersEngine
from cmrm.errors import InputError
from cmrm.tune.remembering import Remembering
from cmrm.tune.space import distributions, drawn, settings_of, space_json
from defenses.oracle import SEEN, UNSEEN, anchor_set

TUNED = (
    "cmrm_dataset", "cmrm_sample", "cmrm_fill", "cmrm_gated", "shiftdc", "null_space",
    "refusal_direction", "astra", "jrs_rem", "alphasteer", "cast", "coca",
)  # fmt: skip
VARIANTS = (
    "cmrm_dataset@paper", "cmrm_sample@paper", "cmrm_fill@gated", "cmrm_gated@cosine",
)  # fmt: skip


@pytest.fixture(scope="module")
def data() -> FitData:
    return anchor_set()


def test_those_that_have_settings_say_which(engine: Remembering) -> None:
    spaces = {name: make_defense(name).space(engine) for name in defense_names()}
    assert {name for name, space in spaces.items() if space} == set(TUNED)
    assert make_defense("adashield_s+cmrm_sample").space(engine) == ()


@pytest.mark.parametrize("name", [*TUNED, *VARIANTS])
def test_a_random_point_makes_the_defence(engine: Remembering, data: FitData, name: str) -> None:
    default = make_defense(name)
    space = default.space(engine)
    rng = random.Random(name)
    seen: dict[str, set[str]] = {}
    for number in range(25):
        settings = settings_of(space, drawn(space, rng))
        defense = make_defense(name, {name: settings})
        defense.check(engine)
        for setting, value in settings.items():
            assert defense.settings[setting] == value, "the space names settings of the defence"
            seen.setdefault(setting, set()).add(str(value))
        if number == 0:
            defense.fit(engine, data)
            replies = respond(engine, defense, SEEN, Decoding(2))
            assert len(replies) == len(SEEN)
    assert all(len(values) > 1 for values in seen.values()), "each setting was varied"
    assert set(seen) <= set(default.settings)


def test_a_row_without_an_image_is_left_alone_at_any_point(
    engine: Remembering, data: FitData
) -> None:
    plain = respond(engine, make_defense("none"), [UNSEEN], Decoding(2))
    space = make_defense("astra").space(engine)
    defense = make_defense("astra", {"astra": settings_of(space, drawn(space, random.Random(1)))})
    defense.fit(engine, data)
    assert respond(engine, defense, [UNSEEN], Decoding(2)) == plain


SPACE = (
    Real("alpha", 0.1, 10.0, log=True), Real("share", 0.0, 1.0), Whole("rank", 1, 3),
    Choice("mixed", (False, True)), LayerRange(5, low=1),
)  # fmt: skip


def test_a_point_as_settings() -> None:
    params: dict[str, Any] = {
        "alpha": 0.123456, "share": 0.5, "rank": 2, "mixed": True, "layers.first": 4,
        "layers.last": 2,
    }  # fmt: skip
    assert settings_of(SPACE, params) == {
        "alpha": 0.1235, "share": 0.5, "rank": 2, "mixed": True, "layers": [2, 3, 4],
    }  # fmt: skip
    assert settings_of(SPACE[:1], {"alpha": 10.0}) == {"alpha": 10.0}
    assert settings_of((Real("a", 0.00014999, 1.0),), {"a": 0.00014999})["a"] >= 0.00014999


def test_points_stay_inside_and_follow_the_seed() -> None:
    made = distributions(SPACE)
    rng = random.Random(3)
    points = [drawn(SPACE, rng) for _ in range(200)]
    for point in points:
        assert set(point) == set(made)
        assert all(made[name]._contains(made[name].to_internal_repr(point[name])) for name in made)
    below = sum(point["alpha"] < 1.0 for point in points)
    assert 70 < below < 130, "ratios count: half lies below the geometric middle"
    rng = random.Random(3)
    assert points == [drawn(SPACE, rng) for _ in range(200)]


def test_a_space_in_outputs() -> None:
    assert space_json(SPACE)[0] == {
        "kind": "Real", "name": "alpha", "low": 0.1, "high": 10.0, "log": True,
    }  # fmt: skip


def test_empty_ranges() -> None:
    for make in (
        lambda: Real("a", 1.0, 1.0), lambda: Real("a", 0.0, 1.0, log=True),
        lambda: Whole("a", 2, 1), lambda: LayerRange(0, low=1),
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"empty|no layer is left"):
            make()


def test_what_does_not_need_another_fit(engine: Remembering, data: FitData) -> None:
    one, other = (make_defense("refusal_direction", {"refusal_direction": {"alpha": a}})
                  for a in (1.0, 2.0))  # fmt: skip
    assert one.fitted_by == other.fitted_by == ()


def test_states_are_read_once_and_are_the_same_bit_for_bit(data: FitData) -> None:
    from cmrm.model.vlm import wrap_vlm
    from tiny import tiny_model, tiny_processor

    vlm = wrap_vlm(tiny_model(), tiny_processor(), model_id="tiny")
    passes: list[int] = []
    vlm.model.register_forward_hook(lambda *call: passes.append(1))
    kept, plain = Remembering(TransformersEngine(vlm)), TransformersEngine(vlm)
    first = kept.states(SEEN, batch_size=2)
    texts, n = kept.text_states(SEEN), len(passes)
    assert first.equal(plain.states(SEEN, batch_size=2))
    assert texts.equal(plain.text_states(SEEN))
    assert len(passes) > n
    n = len(passes)
    first[:] = 0
    assert kept.states(SEEN, batch_size=2).equal(plain.states(SEEN, batch_size=2)), "a copy"
    n, before = len(passes), n
    assert n == before + 1, "the plain engine alone ran"
    kept.states(SEEN[::-1], batch_size=2)
    assert len(passes) == n + 1, "another order is another batch"
    sample = make_defense("cmrm_sample")
    sample.intervene(kept, SEEN, ["a", "b"])
    n = len(passes)
    sample.intervene(kept, SEEN, ["a", "b"])
    assert len(passes) == n
