"""Files of replies by the tools that write them: tables, Inspect, lmms-eval, VLMEvalKit."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cmrm.errors import InputError, MissingExtraError
from cmrm.measure.replies import KINDS, Reading, ReplyFile, Source, replies_of
from cmrm.prompts.tables import (
    SUFFIXES,
    Row,
    is_absent,
    is_saved_dataset,
    read_json,
    read_table,
)
from cmrm.prompts.text import listed, shortened

SHEET, LOG = ".xlsx", ".eval"
"""Suffixes of workbooks, and of Inspect's logs."""
_DATE = re.compile(r"\d{4}-\d\d-\d\dT[\d.-]*\d")
"""Time of a run in file names of lm-eval."""
_SAMPLES = re.compile(r"(?:.+_)?samples_.+\.jsonl")
"""`DATE_samples_TASK.jsonl` of lmms-eval, `samples_TASK_DATE.jsonl` of lm-eval."""


def read_reply_files(
    paths: Sequence[Path],
    reading: Reading,
    *,
    labels: Mapping[str, str] | None = None,
    split: str | None = None,
) -> list[ReplyFile]:
    """Replies of several files, of whatever tools.

    - `.eval`, or `.json` with Inspect's header: a log of Inspect.
    - `.xlsx`: a workbook with one filled sheet, as VLMEvalKit and spreadsheets save it.
    - `.csv`, `.tsv`, `.jsonl`, `.json`, `.parquet`, and folders that `datasets` saved: tables, also
      those of lmms-eval (`*_samples_*.jsonl`) and VLMEvalKit.

    Args:
        paths: the files.
        reading: how their rows are read.
        labels: file, by its name or as in `paths` -> label of its rows that have none.
        split: of a folder that `datasets` saved with several.

    Raises:
        InputError: a file is missing, cannot be read, is named twice or holds no replies; or a word
            that `reading` names is no label of any file.
        MissingExtraError: a library that reads a file is missing.
    """
    names, own = _names(paths), dict(labels or {})
    strangers = [name for name in own if name not in {*map(str, paths), *names}]
    if strangers:
        raise InputError(
            f"--label names {listed(strangers)}, which is none of the files: {listed(names)}"
        )
    if split is not None and not any(path.is_dir() for path in paths):
        raise InputError("--split goes with a folder that `datasets` saved; leave it out")
    files = []
    for path, name in zip(paths, names, strict=True):
        label = own.get(str(path), own.get(name, reading.label))
        source = read_source(path, name, split=split)
        files.append(replies_of(source, replace(reading, label=label)))
    _check_words(files, reading)
    return files


def _check_words(files: Sequence[ReplyFile], reading: Reading) -> None:
    """Raise where a word that the user named is no label of any file."""
    words = {word.casefold() for file in files for word in file.words}
    absent = [word for word in reading.words if word not in words]
    if absent:
        seen = listed(sorted(words), 6) if words else "none"
        raise InputError(
            f"no row has the label {shortened(absent[0])!r}; the labels of the files are: {seen}"
        )


def _names(paths: Sequence[Path]) -> list[str]:
    """Names of the files, with as much of their folders as tells them apart.

    Raises:
        InputError: a file is named twice.
    """
    twice = [path for path, count in Counter(p.resolve() for p in paths).items() if count > 1]
    if twice:
        raise InputError(f"{shortened(twice[0].name)} is named twice; name each file once")
    whole = [path.absolute() for path in paths]
    names = []
    for path in whole:
        alike = [str(other) for other in whole if other.name == path.name]
        root = os.path.commonpath(alike) if len(alike) > 1 else path.parent
        names.append(path.relative_to(root).as_posix())
    return names


def read_source(path: Path, name: str, *, split: str | None = None) -> Source:
    """The rows of one file.

    Args:
        path: the file, or a folder that `datasets` saved.
        name: its name in messages and outputs.
        split: of a folder with several.

    Raises:
        InputError: it is missing, cannot be read, or holds no rows.
        MissingExtraError: a library that reads it is missing.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        if not is_saved_dataset(path):
            raise InputError(
                f"{shortened(path, 160)} is a folder, and no set saved by `datasets`; name the "
                "files in it, such as logs/*.eval"
            )
        return Source(name, read_table(path, split=split), name)
    if not path.is_file():
        raise InputError(f"there is no file {shortened(path, 160)}")
    if suffix == LOG:
        return _inspect_source(path, name)
    if suffix == SHEET:
        rows = _sheet_rows(path)
    elif suffix == ".json":
        content = _json_content(path)
        if isinstance(content, dict) and {"eval", "status"} <= content.keys():
            return _inspect_source(path, name)
        rows = _nested_rows(content) or read_table(path)
    elif suffix in SUFFIXES:
        rows = read_table(path)
    else:
        raise InputError(
            f"{shortened(path, 160)} has an unknown kind {suffix!r}; one of "
            f"{', '.join((*SUFFIXES, SHEET, LOG))}"
        )
    return Source(name, rows, _model_of(path, name, rows))


def _model_of(path: Path, name: str, rows: Sequence[Row]) -> str:
    """The model that a file is of, by the tool that wrote it; else the file's name."""
    path = path.resolve()
    if _SAMPLES.fullmatch(path.name):
        model = _model_beside(path) or _model_in(path.parent.name)
        if model:
            return model
    if {"index", "prediction"} <= rows[0].keys():  # VLMEvalKit: MODEL/[RUN/]MODEL_SET.xlsx
        for folder in path.parents[:2]:
            if folder.name and path.stem.startswith(f"{folder.name}_"):
                return folder.name
    return str(Path(name).with_suffix(""))


def _model_beside(path: Path) -> str:
    """The model by the results of the run that lie beside its samples; empty without them."""
    names = [f"{path.name.partition('_samples_')[0]}_results.json"]
    date = _DATE.search(path.name)
    if date is not None:
        names.append(f"results_{date[0]}.json")
    for name in names:
        try:
            results = read_json(path.with_name(name))
        except InputError:
            continue
        model = results.get("model_name") if isinstance(results, dict) else None
        if isinstance(model, str) and model.strip():
            return model.strip()
    return ""


def _model_in(folder: str) -> str:
    """The model after which lmms-eval named a folder (`owner__model`); empty where it did not."""
    return folder.replace("__", "/").strip("/") if "__" in folder else ""


def _json_content(path: Path) -> Any:
    """The content of a JSON file; None where the table reader has to say what is wrong with it."""
    try:
        return read_json(path)
    except InputError:
        return None


def _nested_rows(content: Any) -> list[Row]:
    """Rows of JSON that no table is like; empty where it is another.

    An object with one list of objects among its values, whatever its key (JailbreakBench, older
    files of lmms-eval); or an object of such lists, whose keys become the column `key` (HarmBench).
    """
    if not isinstance(content, dict) or _are_objects(content.get("data")):
        return []
    lists = {key: value for key, value in content.items() if _are_objects(value)}
    if not lists or (1 < len(lists) < len(content)):
        return []
    nested = len(lists) == len(content) and len(content) > 1
    rows = [
        {"key": key, **row} if nested else dict(row) for key, part in lists.items() for row in part
    ]
    return [row for row in rows if not all(is_absent(cell) for cell in row.values())]


def _are_objects(value: Any) -> bool:
    return bool(value) and isinstance(value, list) and all(isinstance(row, dict) for row in value)


def _inspect_source(path: Path, name: str) -> Source:
    """Samples of a log of Inspect that were answered."""
    try:
        from inspect_ai.log import read_eval_log
    except ImportError:
        raise MissingExtraError(
            "logs of Inspect need inspect_ai; install it with: pip install 'cmrm[eval]'"
        ) from None
    try:
        log = read_eval_log(str(path))
    except Exception as error:  # zip, JSON and schema errors of many kinds
        raise InputError(
            f"{shortened(path, 160)} is no log of Inspect: {shortened(error, 100)}"
        ) from None
    model = log.eval.model
    own = (log.eval.metadata or {}).get("condition") if model.startswith("cmrm/") else None
    if own is not None:  # a cell of `cmrm evaluate`, in the folder of its defence
        model = f"{model}, {path.resolve().parent.name}, {own}"
    rows: list[Row] = []
    left_out = []
    for sample in log.samples or []:
        metadata = dict(sample.metadata or {})
        if sample.error is not None:
            left_out.append(f"Inspect reports an error: {shortened(sample.error.message, 100)}")
        elif own is not None and metadata.get("kind") not in KINDS:
            left_out.append("the sample is neither harmful nor benign")
        else:
            rows.append(_inspect_row(sample, metadata, model, own=own is not None))
    if not rows:
        raise InputError(f"{shortened(path, 160)} holds no sample that was answered")
    missing = (log.eval.dataset.samples or 0) - len(log.samples or [])
    if log.status != "success" and missing > 0:
        left_out += [f"the run of Inspect is {log.status}, the sample was not asked"] * missing
    return Source(name, rows, model, tuple(left_out))


def _inspect_row(sample: Any, metadata: dict[str, Any], model: str, *, own: bool) -> Row:
    """A sample of Inspect; `own`: of `cmrm evaluate`, whose metadata says what was asked."""
    return {
        "request": metadata["request"] if own else _asked(sample.input),
        "reply": sample.output.completion,
        "label": metadata.get("kind") if own else metadata.get("label"),
        "category": metadata.get("category"),
        "model": model,
        "id": sample.id,
        "target": sample.target,
        "metadata": metadata,
    }


def _asked(asked: Any) -> str:
    """The last user turn of an input of Inspect, its text alone."""
    if isinstance(asked, str):
        return asked
    turns = [message for message in asked if message.role == "user"]
    return str(turns[-1].text) if turns else ""


def _sheet_rows(path: Path) -> list[Row]:
    """Rows of the one filled sheet of a workbook; formulas stay as they are written."""
    try:
        from openpyxl import load_workbook
        from openpyxl.utils.escape import unescape
    except ImportError:
        raise MissingExtraError(
            "workbooks need openpyxl; install it with: pip install 'cmrm[eval]'"
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of styles that are missing
            book = load_workbook(path, read_only=True)
            sheets = {sheet.title: _filled_rows(sheet) for sheet in book.worksheets}
        book.close()
    except Exception as error:  # zip and XML errors of many kinds
        raise InputError(
            f"{shortened(path, 160)} is no workbook: {shortened(error, 100)}"
        ) from None
    filled = {title: rows for title, rows in sheets.items() if len(rows) > 1}
    if not filled:
        raise InputError(f"{shortened(path, 160)} holds no rows")
    if len(filled) > 1:
        raise InputError(
            f"{shortened(path, 160)} has the sheets {listed(filled)}; save the one with the "
            "replies as a file of its own"
        )
    table = next(iter(filled.values()))
    header = ["" if is_absent(cell) else str(cell).strip() for cell in table[0]]
    repeated = [column for column, n in Counter(filter(None, header)).items() if n > 1]
    if repeated:
        raise InputError(f"{path} names a column twice: {listed(repeated)}; rename one of them")
    return [
        {
            column: unescape(cell) if isinstance(cell, str) else cell
            for column, cell in zip(header, cells, strict=False)
            if column
        }
        for cells in table[1:]
    ]


def _filled_rows(sheet: Any) -> list[list[Any]]:
    """Rows of a sheet that hold anything."""
    sheet.reset_dimensions()  # some tools write wrong ones
    rows = [list(cells) for cells in sheet.iter_rows(values_only=True)]
    return [cells for cells in rows if not all(map(is_absent, cells))]
