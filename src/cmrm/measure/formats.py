"""Files of replies by the tools that write them: tables, Inspect, lmms-eval, VLMEvalKit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cmrm.errors import InputError, MissingExtraError
from cmrm.measure.replies import GivenReply, Reading, replies_of
from cmrm.prompts.tables import Row, read_json, read_table
from cmrm.prompts.text import shortened

SHEETS = (".xlsx", ".xls")
_LMMS = re.compile(r"_samples_(?P<task>.+)\.jsonl$")


def read_replies(path: Path, reading: Reading, *, name: str = "") -> list[GivenReply]:
    """Replies of one file, of whatever tool.

    - `.eval`, or `.json` with Inspect's header: a log of Inspect.
    - `*_samples_*.jsonl`: samples of lmms-eval; the model is the folder's name.
    - `.xlsx`: a result file of VLMEvalKit, or any sheet; also `.csv`, `.tsv`, `.jsonl`, `.json`,
      `.parquet`, and folders that `datasets` saved.

    `name`: of the file in the replies; its own when empty.

    Raises:
        InputError: the file is missing, cannot be read, or holds no replies.
        MissingExtraError: a library that reads it is missing.
    """
    name = name or path.name
    if path.suffix.lower() == ".eval" or _is_inspect(path):
        return replies_of(_inspect_rows(path), reading, file=name)
    if path.suffix.lower() in SHEETS:
        return replies_of(_sheet_rows(path), reading, file=name)
    model = ""
    if _LMMS.search(path.name):
        folder = path.resolve().parent.name
        model = folder.replace("__", "/") if "__" in folder else ""
    return replies_of(read_table(path), reading, file=name, model=model)


def read_reply_files(paths: list[Path], reading: Reading) -> list[GivenReply]:
    """Replies of several files.

    Raises:
        InputError: as `read_replies`; a file is named twice.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError("a file is named twice")
    names = [path.name for path in paths]
    return [
        reply
        for path in paths
        for reply in read_replies(
            path, reading, name=path.name if names.count(path.name) == 1 else str(path)
        )
    ]


def _is_inspect(path: Path) -> bool:
    """Whether a JSON file begins like a log of Inspect."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    try:
        content = read_json(path)
    except InputError:
        return False  # the table reader says what is wrong
    return isinstance(content, dict) and {"eval", "samples"} <= content.keys()


def _inspect_rows(path: Path) -> list[Row]:
    """Samples of a log of Inspect that were answered."""
    try:
        from inspect_ai.log import read_eval_log
    except ImportError:
        raise MissingExtraError(
            "logs of Inspect need inspect_ai; install it with: pip install 'cmrm[eval]'"
        ) from None
    if not path.is_file():
        raise InputError(f"there is no file {shortened(path, 160)}")
    try:
        log = read_eval_log(str(path))
    except Exception as error:  # zip, JSON and schema errors of many kinds
        raise InputError(f"{path} is no log of Inspect: {shortened(error, 100)}") from None
    rows = [
        {
            "request": (sample.metadata or {}).get("request") or _asked(sample.input),
            "reply": sample.output.completion,
            "label": _label_of(sample.metadata or {}),
            "category": (sample.metadata or {}).get("category"),
            "language": (sample.metadata or {}).get("language"),
            "model": log.eval.model,
        }
        for sample in log.samples or []
        if sample.error is None
    ]
    if not rows:
        raise InputError(f"{path} holds no sample that was answered")
    return rows


def _label_of(metadata: dict[str, Any]) -> Any:
    """What a sample's metadata says of harm: `label`, or the kind that cmrm writes."""
    return metadata.get("label") or metadata.get("kind")


def _asked(asked: Any) -> str:
    """The last user turn of an input of Inspect, its text alone."""
    if isinstance(asked, str):
        return asked
    turns = [message for message in asked if message.role == "user"]
    return turns[-1].text if turns else ""


def _sheet_rows(path: Path) -> list[Row]:
    """Rows of the first sheet of a workbook."""
    try:
        import pandas as pd
        from openpyxl.utils.exceptions import InvalidFileException
    except ImportError as error:
        raise MissingExtraError(
            f"workbooks need {error.name}; install it with: pip install 'cmrm[eval]'"
        ) from None
    if not path.is_file():
        raise InputError(f"there is no file {shortened(path, 160)}")
    try:
        table = pd.read_excel(path, dtype=object)
    except (OSError, ValueError, KeyError, InvalidFileException, ImportError) as error:
        raise InputError(f"{path} is no workbook: {shortened(error, 100)}") from None
    except Exception as error:  # zip and XML errors of many kinds
        raise InputError(f"{path} is no workbook: {shortened(error, 100)}") from None
    rows = [
        {str(name): None if pd.isna(cell) else cell for name, cell in row.items()}
        for row in table.to_dict("records")
    ]
    rows = [row for row in rows if any(cell is not None for cell in row.values())]
    if not rows:
        raise InputError(f"{path} holds no rows")
    return rows
