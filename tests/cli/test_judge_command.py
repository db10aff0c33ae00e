"""`cmrm judge`: files of many tools, bad input, what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from cli.commands import json_of, refused, run
from cmrm.judges import Judge, Verdict

NO = "I'm sorry, but I can't help with that."
YES = "Sure, here is how you do it. First, mix the flour and the water."
ROWS = [
    {"prompt": "How do I bake it?", "response": NO, "label": "harmful", "category": "bread"},
    {"prompt": "How do I burn it?", "response": YES, "label": "harmful", "category": "toast"},
    {"prompt": "How do I cut it?", "response": YES, "label": "benign", "category": "bread"},
    {"prompt": "How do I eat it?", "response": NO, "label": "benign", "category": "toast"},
]


def invoke(*arguments: object) -> Result:
    return run("judge", *arguments)


def results(*arguments: object) -> dict[str, Any]:
    values: dict[str, Any] = json_of("judge", *arguments, "--json")
    return values


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rates(values: dict[str, Any], judge: str = "small", group: int = 0) -> tuple[Any, ...]:
    judged = values["groups"][group]["judges"][judge]
    return tuple(
        None if judged[k] is None else judged[k]["rate"] for k in ("unsafe", "over_refusal")
    )


def test_rates_of_a_file_of_lines(tmp_path: Path) -> None:
    values = results(jsonl(tmp_path / "model.jsonl", ROWS))
    assert values["kind"] == "replies"
    assert rates(values) == (0.5, 0.5)
    assert values["model"]["id"] == "model"
    assert [(g["by"], g["name"]) for g in values["groups"]] == [
        ("all", "all replies"), ("category", "bread"), ("category", "toast"),
    ]  # fmt: skip
    assert rates(values, group=1) == (0.0, 0.0)
    assert rates(values, group=2) == (1.0, 1.0)


def test_several_files_are_several_models(tmp_path: Path) -> None:
    files = [jsonl(tmp_path / name, ROWS) for name in ("a.jsonl", "b.jsonl")]
    values = results(*files)
    assert [g["name"] for g in values["groups"] if g["by"] == "model"] == ["a", "b"]
    assert values["groups"][0]["n"] == 8


def test_any_columns_and_words(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text(f"q;a;kind of q\nbake?;{NO};bad\ncut?;{YES};good\n", encoding="utf-8")
    values = results(
        file, "--map", "request=q,reply=a,label=kind of q", "--harmful", "bad", "--benign", "good"
    )
    assert rates(values) == (0.0, 0.0)


def test_files_of_several_tools_at_once(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for cells in (["index", "question", "prediction"], [0, "bake?", NO], [1, "burn?", YES]):
        book.active.append(cells)
    book.save(tmp_path / "LLaVA_Set.xlsx")
    folder = tmp_path / "llava__llava-1.5-7b"
    folder.mkdir()
    sample = {"doc_id": 0, "input": "bake?", "filtered_resps": [NO]}
    files = [
        jsonl(tmp_path / "own.jsonl", ROWS),
        jsonl(folder / "20260101_000000_samples_task.jsonl", [sample]),
        tmp_path / "LLaVA_Set.xlsx",
    ]
    values = results(*files, "--label", "harmful")
    rows = {g["name"]: (g["harmful"], g["benign"]) for g in values["groups"] if g["by"] == "model"}
    assert rows == {"own": (2, 2), "llava/llava-1.5-7b": (1, 0), "LLaVA_Set": (2, 0)}
    assert rates(values) == (0.4, 0.5)


def test_a_label_for_each_file(tmp_path: Path) -> None:
    rows = [{"prompt": "How do I bake it?", "response": NO}]
    files = [jsonl(tmp_path / name, rows) for name in ("a.jsonl", "b.jsonl")]
    values = results(*files, "--label", "a.jsonl=harmful,b.jsonl=benign")
    assert rates(values) == (0.0, 1.0)


def test_what_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke(jsonl(tmp_path / "model.jsonl", ROWS), "--out", out)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (out / "verdicts.jsonl").read_text().splitlines()]
    assert [line["verdict"] for line in lines if line["judge"] == "small"] == [
        "refused", "complied", "complied", "refused",
    ]  # fmt: skip
    assert [line["row"] for line in lines] == [1, 1, 2, 2, 3, 3, 4, 4]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Over-refusal" in page
    assert "mix the flour" not in page + (out / "verdicts.jsonl").read_text()
    assert json.loads((out / "results.json").read_text())["groups"][0]["n"] == 4


class Sometimes:
    """A judge that fails on some replies, and counts what it is asked."""

    name = "sometimes"

    def __init__(self) -> None:
        self.asked = 0
        self.fails = "burn"

    def judge(self, request: str, reply: str) -> Verdict:
        self.asked += 1
        if self.fails in request:
            raise RuntimeError("no memory")
        return Verdict.REFUSED


@pytest.fixture
def sometimes(monkeypatch: pytest.MonkeyPatch) -> Sometimes:
    """The judge behind the name `sometimes`; `never` cannot be made."""
    import cmrm.judges

    judge, maker = Sometimes(), cmrm.judges.judge_maker

    def never() -> Judge:
        raise OSError("no such model")

    def made(name: str) -> Callable[[], Judge]:
        return {"sometimes": lambda: judge, "never": never}.get(name) or maker(name)

    monkeypatch.setattr(cmrm.judges, "judge_maker", made)
    return judge


def test_a_judge_that_fails_takes_no_verdict_away_and_is_asked_again(
    tmp_path: Path, sometimes: Sometimes
) -> None:
    file = jsonl(tmp_path / "model.jsonl", ROWS)
    arguments = (file, "--judge", "keyword,sometimes", "--out", tmp_path / "out")
    first = invoke(*arguments)
    assert first.exit_code == 0, first.output
    assert "sometimes failed on 1 replies" in first.stderr
    assert "RuntimeError: no memory" in first.stderr
    assert sometimes.asked == 4
    sometimes.fails = "nothing"
    values = results(*arguments)
    assert sometimes.asked == 5
    assert values["judge_failures"] == {}
    assert values["groups"][0]["judges"]["keyword"]["unsafe"]["n"] == 2


def test_a_judge_that_cannot_be_made_takes_no_verdict_away(
    tmp_path: Path, sometimes: Sometimes
) -> None:
    file = jsonl(tmp_path / "model.jsonl", ROWS)
    result = invoke(file, "--judge", "never,keyword", "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert rates(values, "keyword") == (0.5, 0.5)
    assert rates(values, "never") == (None, None)
    assert values["judge_failures"]["never"]["n"] == 4
    assert "never failed on 4 replies" in result.stderr
    assert "--out FOLDER" in result.stderr


def test_every_verdict_failed(tmp_path: Path, sometimes: Sometimes) -> None:
    file, out = jsonl(tmp_path / "m.jsonl", ROWS), tmp_path / "out"
    assert invoke(file, "--judge", "keyword", "--out", out).exit_code == 0
    before = (out / "results.json").read_bytes()
    message = refused("judge", file, "--judge", "never", "--out", out)
    assert message == "every verdict failed; the first: never failed: OSError: no such model"
    assert (out / "results.json").read_bytes() == before


def test_what_is_printed(tmp_path: Path) -> None:
    rows = [*ROWS, {**ROWS[0], "response": ""}]
    result = invoke(jsonl(tmp_path / "model.jsonl", rows))
    assert result.exit_code == 0, result.output
    assert "model.jsonl: 5 replies, 3 of them to harmful and 2 to benign requests" in result.stderr
    assert "reply from 'response'" in result.stderr
    assert "50.0 [9-91] +1 (33-67)" in result.stdout
    assert "judged by small" in result.stdout
    assert "agreement of small and keyword on unsafe: kappa" in result.stdout
    assert "unscored by small: 1, the reply is empty" in result.stdout
    assert "replies without a text to judge: 1" in result.stdout
    assert "flour" not in result.output


def test_many_categories_are_not_printed_in_full(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "category": f"c{k}"} for k in range(50)]
    file = jsonl(tmp_path / "model.jsonl", rows)
    result = invoke(file, "--judge", "keyword")
    assert "and 21 more rows" in result.stdout
    assert len(results(file, "--judge", "keyword")["groups"]) == 51


def test_results_of_another_command_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"kind": "demo"}', encoding="utf-8")
    file = jsonl(tmp_path / "model.jsonl", ROWS)
    assert "another folder" in refused("judge", file, "--out", tmp_path)
    assert (tmp_path / "results.json").read_text(encoding="utf-8") == '{"kind": "demo"}'


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "model.jsonl", ROWS)
    assert "store" in refused("judge", file, "--out", file)


BAD: dict[str, tuple[list[dict[str, Any]], tuple[str, ...], str]] = {
    "no reply": ([{"prompt": "a", "label": "harmful"}], (), "no column for the reply"),
    "no label": ([{"prompt": "a", "response": "b"}], (), "--label harmful"),
    "unknown label": ([{"prompt": "a", "response": "b", "label": "7"}], (), "--harmful WORDS"),
    "two vocabularies": (
        [{"prompt": "a", "response": "b", "label": "harmful"},
         {"prompt": "a", "response": "b", "label": "safe"}], (), "two vocabularies",
    ),
    "wrong map": (ROWS, ("--map", "reply=nowhere"), "no column 'nowhere' for reply"),
    "unknown field": (ROWS, ("--map", "answer=response"), "no field 'answer'"),
    "wrong constant": (ROWS, ("--label", "bad"), "label is 'bad'"),
    "wrong label of a file": (ROWS, ("--label", "model.jsonl=bad"), "label is 'bad'"),
    "label of no file": (ROWS, ("--label", "x.jsonl=harmful"), "none of the files"),
    "two labels of a file": (
        ROWS, ("--label", "model.jsonl=harmful,model.jsonl=benign"), "each file once",
    ),
    "two forms of label": (ROWS, ("--label", "model.jsonl=harmful,benign"), "each file once"),
    "word twice": (ROWS, ("--harmful", "x", "--benign", "x"), "both harmful and benign"),
    "word of no row": (ROWS, ("--harmful", "x"), "no row has the label 'x'"),
    "unknown judge": (ROWS, ("--judge", "nobody"), "unknown judge 'nobody'"),
    "no judge": (ROWS, ("--judge", ","), "names nothing"),
    "split of a file": (ROWS, ("--split", "test"), "--split goes with a folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(tmp_path: Path, name: str) -> None:
    rows, arguments, words = BAD[name]
    assert words in refused("judge", jsonl(tmp_path / "model.jsonl", rows), *arguments)


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    assert "no file" in refused("judge", tmp_path / "none.jsonl")
    (tmp_path / "what.bin").write_bytes(b"\x00\x01")
    assert "unknown kind" in refused("judge", tmp_path / "what.bin")


def test_empty_long_mixed_and_repeated_replies(tmp_path: Path) -> None:
    mixed = "\u4f60\u597d, hello, \u043f\u0440\u0438\u0432\u0435\u0442"
    texts = ["", " ", YES * 2000, NO, NO, mixed, "(" * 100_000]
    rows = [{"prompt": "bake?", "response": text, "label": "harmful"} for text in texts]
    values = results(jsonl(tmp_path / "m.jsonl", rows))
    judged = values["groups"][0]["judges"]["small"]["unsafe"]
    assert judged["unscored"] >= 2
    assert judged["n"] + judged["unscored"] == len(texts)
    notes = " ".join(values["sets"][0]["notes"])
    assert "without a text to judge: 2" in notes
    assert "repeat the request and reply of a model: 2" in notes
    assert values["unscored_reasons"]["small"]["the reply is empty"] == 2


def test_the_default_judge_is_the_package_s_own() -> None:
    import inspect

    from cmrm.cli.judge import judge
    from cmrm.judges import DEFAULT_JUDGE

    assert inspect.signature(judge).parameters["judges"].default == f"{DEFAULT_JUDGE},keyword"


def test_the_example_of_the_docs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "judge.md").read_text(encoding="utf-8")
    example = page.partition("```json\n")[2].partition("```")[0]
    (tmp_path / "replies.jsonl").write_text(example, encoding="utf-8")
    values = results(tmp_path / "replies.jsonl")
    assert values["model"]["id"] == "my-vlm"
    assert rates(values) == (0.0, 0.0)
    assert rates(values, "keyword") == (0.5, 0.0)
