"""Requests and replies inside cells: chats, content parts, lists of one, lists written as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from cmrm.prompts.cells import list_in
from cmrm.prompts.tables import is_absent

Role = Literal["request", "reply"]
"""What is looked for in a cell."""

_USERS = ("user", "human")
_MODELS = ("assistant", "gpt", "model", "bot", "ai", "chatbot")
_INSIDE = (
    "content", "text", "value", "parts", "generated_text", "gen_args_0", "arg_0", "refusal",
)  # fmt: skip
"""Keys of an object under which its text stands: a message of OpenAI, ShareGPT or Gemini, a part of
its content, an answer of vLLM, the arguments that lm-eval logs."""


def text_in(cell: Any, role: Role) -> Any:
    """What a cell says as a request or a reply; cells of any other form as they are.

    - A chat: the last reply of the model, or the last request before it. Where the user has the
      last word, the request is that one, and there is no reply (None).
    - A message, or a list of content parts: its text.
    - A list of one: what is inside.
    - lmms-eval's arguments, `[text, {...}, 0, "task", "split"]`: their text.
    """
    if isinstance(cell, Mapping):
        inside = next((key for key in _INSIDE if not is_absent(cell.get(key))), None)
        return cell if inside is None else text_in(cell[inside], role)
    if not isinstance(cell, list | tuple):
        return cell
    if not cell:
        return None
    if all(_role_of(part) is not None for part in cell):
        return _turn(cell, role)
    if all(isinstance(part, Mapping) for part in cell):
        texts = [part["text"] for part in cell if isinstance(part.get("text"), str)]
        return "\n".join(texts) if texts else cell
    arguments = isinstance(cell[0], str) and len(cell) > 1 and isinstance(cell[1], Mapping)
    if len(cell) == 1 or (role == "request" and arguments):
        return text_in(cell[0], role)
    return cell


def _role_of(part: Any) -> str | None:
    """Who speaks in a message; None where it is no message."""
    role = part.get("role", part.get("from")) if isinstance(part, Mapping) else None
    return role.strip().lower() if isinstance(role, str) else None


def _turn(chat: Sequence[Mapping[str, Any]], role: Role) -> Any:
    """The text of the last request of a chat, or of the reply to it."""
    roles = [_role_of(message) for message in chat]
    user = _last(roles, _USERS, len(chat))
    model = _last(roles, _MODELS, len(chat))
    if role == "request":
        place = user if model < user else _last(roles, _USERS, max(model, 0))
    else:
        place = model if model > user else -1
    return text_in(chat[place], role) if place >= 0 else None


def _last(roles: Sequence[str | None], names: Sequence[str], end: int) -> int:
    """The last place before `end` whose role is one of `names`; -1 where there is none."""
    return next((place for place in reversed(range(end)) if roles[place] in names), -1)


def unpacked(cells: Sequence[Any]) -> list[Any]:
    """The cells of a column; lists that were written as text become lists.

    A spreadsheet holds `["text"]` or a chat as text, in JSON or as Python prints it. They are read
    where every cell of the column that is not blank is such a list.
    """
    texts = [cell for cell in cells if not is_absent(cell)]
    if not texts or not all(isinstance(cell, str) and _looks_listed(cell) for cell in texts):
        return list(cells)
    lists = [None if is_absent(cell) else list_in(cell.strip()) for cell in cells]
    read = sum(value is not None for value in lists)
    return lists if read == len(texts) else list(cells)


def _looks_listed(text: str) -> bool:
    text = text.strip()
    return text.startswith("[") and text.endswith("]")
