"""Files of replies by the tools that write them, in the layouts that those write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cmrm.errors import InputError
from cmrm.measure.formats import read_reply_files
from cmrm.measure.replies import GivenReply, Reading, ReplyFile

NO = "I'm sorry, but I can't help with that."
YES = "Sure. First, mix the flour and the water."
ROWS = [
    {"prompt": "How do I bake it?", "response": NO, "label": "harmful"},
    {"prompt": "How do I cut it?", "response": YES, "label": "benign"},
]
PAIRS = [(row["prompt"], row["response"]) for row in ROWS]


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(*paths: Path, label: str | None = None, **settings: Any) -> list[ReplyFile]:
    reading = Reading(label=label, harmful=settings.pop("harmful", ()))
    return read_reply_files(paths, reading, **settings)


def replies(*paths: Path, label: str | None = "harmful") -> tuple[GivenReply, ...]:
    return tuple(reply for file in read(*paths, label=label) for reply in file.replies)


def pairs(*paths: Path) -> list[tuple[str, str]]:
    return [(reply.request, reply.reply) for reply in replies(*paths)]


def message_of(*paths: Path, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(*paths, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_as_spreadsheets_save_them(tmp_path: Path, separator: str, encoding: str) -> None:
    file = tmp_path / "mine.csv"
    quoted = [[f'"{cell}"' for cell in row.values()] for row in ROWS]
    text = "\r\n".join(separator.join(row) for row in (list(ROWS[0]), *quoted))
    file.write_bytes(text.encode(encoding))
    assert pairs(file) == PAIRS


@pytest.mark.parametrize(
    "content",
    [
        ROWS,
        {"data": ROWS},
        {"parameters": {"seed": 0}, "jailbreaks": ROWS},
        {"args": {}, "logs": ROWS, "time": 1.0},
        {"first": ROWS[:1], "second": ROWS[1:]},
        {name: [row[name] for row in ROWS] for name in ROWS[0]},
    ],
)
def test_shapes_of_json(tmp_path: Path, content: Any) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    assert pairs(file) == PAIRS


def test_parquet_and_saved_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(str(tmp_path / "mine.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    splits = datasets.DatasetDict({"train": table, "test": table.select([0])})
    splits.save_to_disk(str(tmp_path / "splits"))
    assert pairs(tmp_path / "mine.parquet") == PAIRS
    assert pairs(tmp_path / "saved") == PAIRS
    (file,) = read(tmp_path / "splits", split="test")
    assert len(file.replies) == 1
    assert "--split" in message_of(tmp_path / "splits")


def workbook(path: Path, **sheets: Sequence[Sequence[Any]]) -> Path:
    book = pytest.importorskip("openpyxl").Workbook()
    book.remove(book.active)
    for title, rows in sheets.items():
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)
    return path


def test_workbooks(tmp_path: Path) -> None:
    rows: list[list[Any]] = [
        [None, None],
        list(ROWS[0]),
        *(list(row.values()) for row in ROWS),
        [None, None, None],
    ]
    assert pairs(workbook(tmp_path / "mine.xlsx", one=rows, two=[])) == PAIRS


def test_words_that_pandas_takes_for_nothing_are_replies(tmp_path: Path) -> None:
    rows = [["prompt", "response"], ["Any?", "None"], ["Any?", "N/A"], ["Any?", "line_x000D_end"]]
    file = workbook(tmp_path / "mine.xlsx", one=rows)
    assert [reply for _, reply in pairs(file)] == ["None", "N/A", "line\rend"]


def test_workbooks_that_cannot_be_read(tmp_path: Path) -> None:
    rows = [["prompt", "response"], ["a", "b"]]
    assert "sheets one, two" in message_of(workbook(tmp_path / "a.xlsx", one=rows, two=rows))
    assert "no rows" in message_of(workbook(tmp_path / "b.xlsx", one=rows[:1]))
    twice = [["prompt", "prompt"], ["a", "b"]]
    assert "twice" in message_of(workbook(tmp_path / "c.xlsx", one=twice))


def test_result_files_of_vlmevalkit(tmp_path: Path) -> None:
    header = ["index", "question", "answer", "category", "prediction"]
    rows: list[list[Any]] = [header, [0, "bake?", "B", "bread", NO], [1, "cut?", "A", "toast", YES]]
    work = tmp_path / "LLaVA_1.5" / "T20260101_G0"
    first, second = replies(workbook(work / "LLaVA_1.5_SIUO.xlsx", one=rows))
    assert (first.request, first.reply, first.category) == ("bake?", NO, "bread")
    assert first.model == second.model == "LLaVA_1.5"
    assert replies(workbook(tmp_path / "x" / "Other_SIUO.xlsx", one=rows))[0].model == "Other_SIUO"


def samples(folder: Path, *, name: str = "20260101_101112_samples_task.jsonl") -> Path:
    """As lmms-eval writes them today: without the document."""
    rows = [
        {"doc_id": k, "target": "", "filtered_resps": [row["response"]], "doc_hash": "1",
         "input": row["prompt"], "task_score": {"question_id": k}}
        for k, row in enumerate(ROWS)
    ]  # fmt: skip
    return lines(folder / name, rows)


def test_samples_of_lmms_eval(tmp_path: Path) -> None:
    file = samples(tmp_path / "llava-hf__llava-1.5-7b-hf")
    assert pairs(file) == PAIRS
    assert replies(file)[0].model == "llava-hf/llava-1.5-7b-hf"


def test_the_model_of_samples_by_the_results_beside_them(tmp_path: Path) -> None:
    file = samples(tmp_path)
    assert replies(file)[0].model == file.stem
    results = tmp_path / "20260101_101112_results.json"
    results.write_text(json.dumps({"model_name": "owner/model"}), encoding="utf-8")
    assert replies(file)[0].model == "owner/model"
    results.write_text("broken", encoding="utf-8")
    assert replies(file)[0].model == file.stem


def test_samples_with_documents_and_arguments(tmp_path: Path) -> None:
    rows = [
        {"doc_id": 0, "doc": {"question": "bake?", "category": "bread"}, "target": "x",
         "arguments": [["bake? Answer briefly.", {"until": []}]], "resps": [[NO]],
         "filtered_resps": [NO]},
    ]  # fmt: skip
    (reply,) = replies(lines(tmp_path / "1_samples_task.jsonl", rows))
    assert (reply.request, reply.reply, reply.category) == ("bake?", NO, "bread")


def test_samples_of_lm_eval(tmp_path: Path) -> None:
    rows = [{"arguments": {"gen_args_0": {"arg_0": "bake?", "arg_1": {}}}, "resps": [[NO]]}]
    name = "samples_task_2026-01-01T10-11-12.345678.jsonl"
    file = lines(tmp_path / "owner__model" / name, rows)
    assert pairs(file) == [("bake?", NO)]
    assert replies(file)[0].model == "owner/model"


def log(path: Path, **changes: Any) -> Path:
    """A log of Inspect with three samples; one of them failed."""
    pytest.importorskip("inspect_ai")
    from inspect_ai.log import (
        EvalConfig,
        EvalDataset,
        EvalError,
        EvalLog,
        EvalSample,
        EvalSpec,
        write_eval_log,
    )
    from inspect_ai.model import ChatMessageSystem, ChatMessageUser, ModelOutput

    error = EvalError(message="no memory", traceback="", traceback_ansi="")
    made = [
        EvalSample(
            id=k, epoch=1, target="",
            input=[ChatMessageSystem(content="Be kind."), ChatMessageUser(content=row["prompt"])],
            output=ModelOutput.from_content("mockllm/model", row["response"]),
            metadata={"label": row["label"], "kind": row["label"], "harm_category": "bread",
                      "request": "as the set asks"},
            error=None if k < 2 else error,
        )
        for k, row in enumerate([*ROWS, ROWS[0]])
    ]  # fmt: skip
    spec = {"created": "2026-01-01T00:00:00+00:00", "task": "t", "dataset": EvalDataset(),
            "model": "mockllm/model", "config": EvalConfig()}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_eval_log(EvalLog(eval=EvalSpec(**{**spec, **changes}), samples=made), str(path))
    return path


@pytest.mark.parametrize("suffix", ["eval", "json"])
def test_logs_of_inspect(tmp_path: Path, suffix: str) -> None:
    (file,) = read(log(tmp_path / f"run.{suffix}"))
    assert [(reply.request, reply.reply) for reply in file.replies] == PAIRS
    assert [reply.kind for reply in file.replies] == ["harmful", "benign"]
    assert {reply.model for reply in file.replies} == {"mockllm/model"}
    assert file.left_out == ("Inspect reports an error: no memory",)


def test_metadata_of_inspect_can_be_mapped(tmp_path: Path) -> None:
    reading = Reading({"category": "metadata.harm_category"})
    (file,) = read_reply_files([log(tmp_path / "run.eval")], reading)
    assert file.replies[0].category == "bread"


def test_logs_of_cmrm_evaluate_are_told_apart_by_defence_and_condition(tmp_path: Path) -> None:
    more = {"model": "cmrm/demo", "metadata": {"condition": "original", "set": {}}}
    first, second = replies(log(tmp_path / "ecso" / "run.eval", **more))
    assert first.model == second.model == "cmrm/demo, ecso, original"
    assert first.request == "as the set asks"


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    files = [lines(tmp_path / run / "x" / "mine.jsonl", ROWS) for run in ("a", "b")]
    read_files = read(*files)
    assert [file.name for file in read_files] == ["a/x/mine.jsonl", "b/x/mine.jsonl"]
    assert [file.replies[0].model for file in read_files] == ["a/x/mine", "b/x/mine"]


def test_a_label_for_each_file(tmp_path: Path) -> None:
    rows = [{"prompt": "Any?", "response": YES}]
    files = [lines(tmp_path / f"{name}.jsonl", rows) for name in "ab"]
    labels = {"a.jsonl": "harmful", str(files[1]): "benign"}
    first, second = read(*files, labels=labels)
    assert (first.replies[0].kind, second.replies[0].kind) == ("harmful", "benign")
    assert "none of the files" in message_of(files[0], labels={"c.jsonl": "harmful"})


def test_words_that_no_row_has(tmp_path: Path) -> None:
    file = lines(tmp_path / "mine.jsonl", ROWS)
    message = message_of(file, harmful=("jailbreak",))
    assert "no row has the label 'jailbreak'" in message
    assert "benign, harmful" in message


def test_the_same_file_twice(tmp_path: Path) -> None:
    file = lines(tmp_path / "mine.jsonl", ROWS)
    assert "named twice" in message_of(file, tmp_path / "." / "mine.jsonl")


BROKEN: dict[str, tuple[bytes | None, str]] = {
    "none.jsonl": (None, "no file"),
    "owner/name": (None, "no file"),
    "empty.csv": (b"", "no rows"),
    "blank.jsonl": (b"\n{}\n", "no rows"),
    "broken.eval": (b"not a zip", "no log of Inspect"),
    "broken.xlsx": (b"not a zip", "no workbook"),
    "broken.jsonl": (b"{", "no JSON"),
    "broken.json": (b"[{]", "no JSON"),
    "text.json": (b'"text"', "no list of objects"),
    "broken.parquet": (b"PAR1", "no whole Parquet file"),
    "log.json": (b'{"eval": {}, "status": "success"}', "no log of Inspect"),
    "latin.csv": ("prompt,response\n\xe9,\xe9\n".encode("latin-1"), "UTF-8"),
    "image.csv": (b"\x89PNG\r\n\x1a\n\x00\x00", "UTF-8"),
    "old.xls": (b"\xd0\xcf\x11\xe0", "unknown kind '.xls'"),
    "what.bin": (b"\x00\x01", "unknown kind '.bin'"),
    "quotes.csv": (b'prompt,response,label\n"a,b,harmful\n', "CSV"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    content, words = BROKEN[name]
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    if name.endswith((".eval", "log.json")):
        pytest.importorskip("inspect_ai")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert words in message_of(tmp_path / name, label="harmful")


def test_a_folder_that_is_no_table(tmp_path: Path) -> None:
    assert "name the files in it" in message_of(tmp_path)
