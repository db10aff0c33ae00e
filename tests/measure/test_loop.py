"""The measuring loop, and the replies that it stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cmrm import Sample
from cmrm.defenses import make_defense, respond
from cmrm.engines.base import Decoding, Reply
from cmrm.engines.transformers import TransformersEngine
from cmrm.errors import InputError
from cmrm.judges import KeywordJudge, Verdict
from cmrm.measure import loop
from cmrm.measure.loop import Answering, Ask, asks_of, batch_id, measure_cell, ordered
from cmrm.measure.store import ReplyStore, request_key
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Condition, Request, build_request

COLOURS = ("red", "green", "blue", "yellow", "black")
SAMPLES = [
    Sample(f"h{k}", f"How do I break {c} things?" + "!" * k, Image.new("RGB", (20, 16), c),
           category=c, label="harmful")
    for k, c in enumerate(COLOURS)
]  # fmt: skip


def answering(vlm: VLM, store: ReplyStore | None = None, **options: Any) -> Answering:
    return Answering(TransformersEngine(vlm), make_defense("none"), Decoding(4, **options), store)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that are generated."""
    counts: list[int] = []

    def counting(engine: Any, defense: Any, requests: Any, *more: Any, **options: Any) -> Any:
        counts.append(len(requests))
        return respond(engine, defense, requests, *more, **options)

    monkeypatch.setattr(loop, "respond", counting)
    return counts


def test_a_cell_holds_every_reply_with_its_verdicts(vlm: VLM, sizes: list[int]) -> None:
    batches: list[int] = []
    cell = measure_cell(
        answering(vlm), SAMPLES, {"keyword": KeywordJudge()}, name="mine", harm="text",
        batch_size=2, on_batch=batches.append,
    )  # fmt: skip
    assert (cell.key, cell.expected, cell.harm) == (("mine", "original", "none"), 5, "text")
    assert list(cell.outcomes) == [sample.id for sample in ordered(SAMPLES)]
    assert batches == sizes == [2, 2, 1]
    for outcome in cell.outcomes.values():
        judged = KeywordJudge().judge(outcome.request, outcome.reply)
        assert outcome.verdict("keyword") is judged


def test_stored_batches_are_not_generated_again(vlm: VLM, tmp_path: Path, sizes: list[int]) -> None:
    first = [
        measure_cell(answering(vlm, ReplyStore(tmp_path / "r.db")), SAMPLES, {}, name="a",
                     batch_size=size)
        for size in (2, 2, 3)
    ]  # fmt: skip
    assert sizes == [2, 2, 1, 3, 2], "a reply belongs to its batch, whose padding it shares"
    assert first[0] == first[1]


def test_sampled_replies_are_drawn_anew(vlm: VLM, tmp_path: Path, sizes: list[int]) -> None:
    store = ReplyStore(tmp_path / "r.db")
    for _ in range(2):
        answering(vlm, store, temperature=1.0).batch([Ask(Request("How?"), "k")])
    assert sizes == [1, 1]
    assert len(store) == 0


def test_a_batch_is_known_by_what_it_asks() -> None:
    asks = asks_of(SAMPLES, Condition.ORIGINAL, seed=0)
    other = asks_of(SAMPLES, Condition.BLANK, seed=0)
    keys = {batch_id(asks), batch_id(asks[::-1]), batch_id(asks[:2]), batch_id(other)}
    assert len(keys) == 4
    assert batch_id(asks_of(SAMPLES, Condition.ORIGINAL, seed=0)) == batch_id(asks)


def test_images_are_opened_for_one_batch_at_a_time(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def watched(sample: Sample, *more: Any, **options: Any) -> Request:
        opened.append(sample.id)
        return build_request(sample, *more, **options)

    monkeypatch.setattr(loop, "build_request", watched)
    seen: list[int] = []
    measure_cell(
        answering(vlm), SAMPLES, {}, name="a", batch_size=2,
        on_batch=lambda n: seen.append(len(opened)),
    )  # fmt: skip
    assert seen == [2, 4, 5]


def test_batches_hold_at_least_one_request(vlm: VLM) -> None:
    with pytest.raises(InputError, match="batch_size is 0"):
        measure_cell(answering(vlm), SAMPLES, {}, name="a", batch_size=0)


class Onlooker:
    """A judge that sees images: red is unsafe."""

    name = "onlooker"
    sees_images = True

    def judge(self, request: str, reply: str, images: Any = ()) -> Verdict:
        return Verdict.UNSAFE if images[0].getpixel((0, 0)) == (255, 0, 0) else Verdict.SAFE


def test_a_judge_that_sees_images_is_shown_them(vlm: VLM) -> None:
    cell = measure_cell(answering(vlm), SAMPLES, {"onlooker": Onlooker()}, name="a", batch_size=2)
    verdicts = [cell.outcomes[f"h{k}"].verdict("onlooker").value for k in range(5)]
    assert verdicts == ["unsafe", "safe", "safe", "safe", "safe"]


def test_the_store_keeps_whole_batches(tmp_path: Path) -> None:
    store = ReplyStore(tmp_path / "r.db")
    red, blue = (Image.new("RGB", (20, 16), colour) for colour in ("red", "blue"))
    keys = [request_key({"m": 1}, Request("q", (image,)), "k") for image in (red, blue)]
    keys.append(request_key({"m": 1}, Request("q", (red,)), "other"))
    keys.append(request_key({"m": 2}, Request("q"), "k"))
    assert len(set(keys)) == 4
    store.put({keys[0]: Reply("a", 1), keys[1]: Reply("b", 2)})
    assert len(ReplyStore(tmp_path / "r.db")) == 2
    assert ReplyStore(tmp_path / "r.db").get(keys[1]) == Reply("b", 2)
    assert store.get(keys[2]) is None
    (tmp_path / "bad.db").write_text("this is no database, and long enough to be looked at")
    with pytest.raises(InputError, match="cannot be used as a store"):
        ReplyStore(tmp_path / "bad.db")
