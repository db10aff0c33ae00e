"""Judges by their names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="endpoints need the extra `eval`")

from cmrm.errors import InputError, MissingExtraError, ModelError
from cmrm.judges import KeywordJudge, judge_maker, judge_model, judge_names, make_judge
from cmrm.judges.endpoint import EndpointJudge
from cmrm.judges.local import ChatJudge, chat_source
from cmrm.judges.rubrics import parse_strongreject
from judges.fakes import Listener, chat_tokenizer


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("oracle", "unknown judge 'oracle'"),
        ("chat:", "unknown judge"),
        ("chat:#engages", "no chat:MODEL"),
        ("chat:m#mine", "unknown rubric"),
        ("guard:magic=x", "no guard:KIND=MODEL"),
        ("guard:wildguard", "no guard:KIND=MODEL"),
        ("openai:m", "no openai:MODEL@URL"),
        ("openai:m@localhost", "no address"),
        ("openai:m@http://x y", "no address"),
        ("openai:m@http://x#mine", "unknown rubric"),
    ],
)
def test_names_of_no_judge(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_judge(name)


def test_plain_names() -> None:
    assert isinstance(make_judge("keyword"), KeywordJudge)
    assert [make_judge(name).name for name in ("keyword", "regression", "ensemble")] == [
        "keyword",
        "regression",
        "ensemble",
    ]
    assert "openai:MODEL@URL" in judge_names()


def test_a_name_is_checked_before_its_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from cmrm.judges import guard, local

    def never(*args: object, **options: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(local, "load_judge_model", never)
    monkeypatch.setattr(guard, "load_judge_model", never)
    models = {
        "keyword": None,
        "chat:a/b": "a/b",
        "chat:a/b#strongreject": "a/b",
        "guard:wildguard=c/d": "c/d",
        "guard:qwen3guard=c/d": "c/d",
        "openai:m@http://localhost:1/v1": None,
    }
    assert {name: judge_model(name) for name in models} == models
    with pytest.raises(AssertionError, match="loaded"):
        judge_maker("chat:a/b")()


def test_chat_models_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cmrm.judges import local

    tokenizer = chat_tokenizer()
    monkeypatch.setattr(local, "load_judge_model", lambda source: (Listener(tokenizer), tokenizer))
    judge = make_judge("chat:meta-llama/Meta-Llama-3-8B-Instruct#strongreject")
    assert isinstance(judge, ChatJudge)
    assert judge.name.endswith("Instruct#strongreject")
    assert judge.rubric.parse is parse_strongreject
    folder = tmp_path / "a#b"
    folder.mkdir()
    assert chat_source(str(folder)) == (str(folder), "engages"), (
        "the folder's own name has the mark"
    )
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="has no chat template"):
        make_judge("chat:some/model")


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load the judge"):
        make_judge(f"guard:wildguard={tmp_path}")


def test_endpoints_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", " k\n")
    judge = make_judge("openai:m@http://localhost:1/v1/chat/completions#strongreject")
    assert isinstance(judge, EndpointJudge)
    assert judge.key == "k"
    assert judge.url == "http://localhost:1/v1"
    assert judge.rubric.parse is parse_strongreject


def test_a_key_that_no_header_can_hold_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret\u2019key")
    with pytest.raises(InputError, match="characters that no key has") as caught:
        make_judge("openai:m@http://localhost:1/v1")
    assert "secret" not in str(caught.value)


def test_without_the_client_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delitem(sys.modules, "cmrm.judges.endpoint", raising=False)
    with pytest.raises(MissingExtraError, match=r"needs the client openai; .*cmrm\[eval\]"):
        judge_maker("openai:m@http://localhost:1/v1")


def test_a_cap_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMRM_JUDGE_MAX_CALLS", "a few")
    with pytest.raises(InputError, match="CMRM_JUDGE_MAX_CALLS is 'a few'"):
        make_judge("openai:m@http://localhost:1/v1")
