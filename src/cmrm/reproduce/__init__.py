"""Published tables as runs: recipes, their plans, and published figures beside the run's."""

from importlib.util import find_spec

from cmrm.errors import MissingExtraError

_missing = [name for name in ("pydantic", "yaml") if find_spec(name) is None]
if _missing:
    raise MissingExtraError(
        f"recipes need {', '.join(_missing)}; pip install 'cmrm[eval]' brings it"
    )
