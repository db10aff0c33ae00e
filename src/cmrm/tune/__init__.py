"""The choice of a setting: any defence, by one command, on a dev set and never on test."""

from importlib.util import find_spec

from cmrm.errors import MissingExtraError

_missing = [
    name
    for name in ("optuna", "sqlalchemy", "scipy", "sklearn", "pydantic")
    if find_spec(name) is None
]
if _missing:
    raise MissingExtraError(
        f"tuning needs {', '.join(_missing)}; pip install 'cmrm[tune]' brings it"
    )
