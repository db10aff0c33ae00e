"""Requests of many callers share batches, and none waits for ever."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="evaluation needs the extra `eval`")

from inspect_ai import Task, eval
from inspect_ai.dataset import MemoryDataset
from inspect_ai.dataset import Sample as InspectSample
from inspect_ai.model import ChatMessageUser, GenerateConfig, get_model
from inspect_ai.scorer import includes

from cmrm import Sample
from cmrm.defenses import respond
from cmrm.engines.base import Engine
from cmrm.evaluate import batcher
from cmrm.evaluate.provider import PLACE, CmrmAPI
from cmrm.evaluate.run import evaluate
from cmrm.measure import loop
from cmrm.prompts import Loaded
from cmrm.prompts.conditions import Condition, Request
from evaluate.plans import count_batches, picture, quiet, small_plan

pytestmark = pytest.mark.usefixtures("no_models_left")
CONFIG = GenerateConfig(max_tokens=3)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that are generated."""
    return count_batches(monkeypatch)


def placed(text: str, size: int, index: int = 0) -> ChatMessageUser:
    """A message that belongs to an announced batch."""
    place = {"batch": "b", "size": size, "index": index, "key": text}
    return ChatMessageUser(content=text, metadata={PLACE: place})


def completions(api: CmrmAPI, messages: list[ChatMessageUser]) -> list[str]:
    async def together() -> list[str]:
        requests = (api.generate([message], [], "none", CONFIG) for message in messages)
        outputs = await asyncio.gather(*requests, return_exceptions=True)
        return [f"! {o}" if isinstance(o, BaseException) else o.completion for o in outputs]

    return asyncio.run(asyncio.wait_for(together(), 60))


def test_concurrent_requests_share_batches(checkpoint: str, sizes: list[int]) -> None:
    api = CmrmAPI(checkpoint, batch_size=3)
    messages = [ChatMessageUser(content=f"Tell me about {k}") for k in range(5)]
    assert len(completions(api, messages)) == 5
    assert sorted(sizes) == [2, 3]


def test_batches_are_whole_whatever_their_size(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    """Inspect sends 20 requests at first; a larger batch would wait for the others."""
    monkeypatch.setattr(batcher, "PATIENCE", 1.0)
    samples = [Sample(f"h{k}", f"How {k}?", picture("red"), label="harmful") for k in range(70)]
    plan = small_plan(
        checkpoint, sets=(Loaded("many", tuple(samples)),), defenses=(), batch_size=32,
        conditions=(Condition.ORIGINAL,), max_new_tokens=2,
    )  # fmt: skip
    evaluate(plan, tmp_path, say=quiet)
    assert sorted(sizes) == [6, 32, 32]
    rows = [InspectSample(input=f"What is {k}?", target="x") for k in range(48)]
    task = Task(dataset=MemoryDataset(rows), scorer=includes())
    model = get_model(f"cmrm/{checkpoint}", memoize=False, batch_size=24)
    sizes.clear()
    eval(task, model=model, log_dir=str(tmp_path / "l"), display="none", max_tokens=2)
    assert sizes == [24, 24], "of a task of somebody else too"


def test_a_cancelled_request_does_not_hold_up_the_others(checkpoint: str) -> None:
    api = CmrmAPI(checkpoint, batch_size=2)

    async def run() -> str:
        request = api.generate([ChatMessageUser(content="first")], [], "none", CONFIG)
        task = asyncio.create_task(request)
        await asyncio.sleep(0.05)
        task.cancel()
        second = await api.generate([ChatMessageUser(content="second")], [], "none", CONFIG)
        return second.completion

    assert isinstance(asyncio.run(asyncio.wait_for(run(), 60)), str)


def test_a_bad_request_fails_alone(checkpoint: str, sizes: list[int]) -> None:
    api = CmrmAPI(checkpoint, batch_size=1)
    texts = ("good one", "bad", "good two")
    outcomes = completions(api, [ChatMessageUser(content=text) for text in texts])
    assert outcomes[1] == "! broken"
    assert not outcomes[0].startswith("!")
    assert not outcomes[2].startswith("!")


def test_an_announced_batch_whose_member_never_comes(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    monkeypatch.setattr(batcher, "PATIENCE", 0.5)
    api = CmrmAPI(checkpoint, batch_size=4)
    assert not completions(api, [placed("alone", 4)])[0].startswith("!")
    assert sizes == [1]


def test_a_stored_reply_waits_for_no_batch(
    checkpoint: str, tmp_path: Path, sizes: list[int]
) -> None:
    store = str(tmp_path / "replies.db")
    first = completions(
        CmrmAPI(checkpoint, batch_size=2, store=store), [placed("one", 2), placed("two", 2, 1)]
    )
    again = completions(CmrmAPI(checkpoint, batch_size=2, store=store), [placed("two", 2, 1)])
    assert again == first[1:], "without its neighbour"
    assert sizes == [2]


def test_rows_stand_in_their_places_whoever_comes_first(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def watching(
        engine: Engine, defense: Any, requests: list[Request], *more: Any, **o: Any
    ) -> Any:
        seen.append([request.text for request in requests])
        return respond(engine, defense, requests, *more, **o)

    monkeypatch.setattr(loop, "respond", watching)
    messages = [placed("the longest", 3, 0), placed("b", 3, 1), placed("a", 3, 2)]
    for order in (messages, messages[::-1]):
        completions(CmrmAPI(checkpoint, batch_size=3), order)
    assert seen == [["the longest", "b", "a"]] * 2


def test_a_closed_provider_answers_what_waits_and_may_be_used_again(
    checkpoint: str, sizes: list[int]
) -> None:
    api = CmrmAPI(checkpoint, batch_size=2)
    assert len(completions(api, [ChatMessageUser(content="one")])) == 1
    api.close()
    api.close()
    assert not completions(api, [ChatMessageUser(content="two")])[0].startswith("!")
    assert sizes == [1, 1]
