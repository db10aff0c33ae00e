"""Evaluation on Inspect: a model provider, tasks, scorers, runs that can be resumed, rescoring."""

from importlib.util import find_spec

from cmrm.errors import MissingExtraError

_missing = [name for name in ("inspect_ai", "anyio", "sniffio", "scipy") if find_spec(name) is None]
if _missing:
    raise MissingExtraError(
        f"evaluation needs {', '.join(_missing)}; pip install 'cmrm[eval]' brings it"
    )
