"""Documents with a schema of their own, written and read as JSON: `results.json`, `tune.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmrm.errors import InputError, MissingExtraError

try:
    from pydantic import BaseModel, ValidationError
except ImportError:
    raise MissingExtraError("results need pydantic; pip install 'cmrm[eval]' brings it") from None


def validated(kind: type[BaseModel], values: Mapping[str, Any], complaint: str) -> dict[str, Any]:
    """A document in its schema, as JSON values.

    Args:
        kind: the class of the whole document.
        values: its fields.
        complaint: how an error begins, such as `these are no results of cmrm`.

    Raises:
        InputError: it has another form; the first place is named.
    """
    try:
        document = kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{complaint}: {place}: {first['msg']}") from None
    written: dict[str, Any] = json.loads(document.model_dump_json(by_alias=True))
    return written


def read_document(path: Path, schema: str, what: str) -> dict[str, Any]:
    """The JSON object of a file whose field `schema` is the wanted one.

    Args:
        path: the file.
        schema: value of its field `schema`.
        what: what it should hold, such as `results of cmrm`.

    Raises:
        InputError: it is missing, damaged, or of another schema.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} holds no {what}: {error}") from None
    if not isinstance(values, dict) or values.get("schema") != schema:
        raise InputError(
            f"{path} holds no {what} that this version reads: its schema is not {schema}"
        )
    return values
