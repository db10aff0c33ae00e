"""A server that answers as endpoints of OpenAI's protocol do, and judges that ask it."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cmrm.judges.endpoint import EndpointJudge

NO_MAX_TOKENS = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. "
    "Use 'max_completion_tokens' instead."
)
NO_TEMPERATURE = "Unsupported value: 'temperature' does not support 0 with this model."


class Error:
    """An answer with a status, an error message or document, and headers."""

    def __init__(self, status: int, message: Any = "not now", **headers: str) -> None:
        document = message if isinstance(message, dict) else {"message": message}
        self.status, self.document, self.headers = status, {"error": document}, headers


class Raw:
    """An answer of these bytes; a connection that is cut before `length` where it is larger."""

    def __init__(self, body: bytes, length: int | None = None, status: int = 200) -> None:
        self.body, self.status = body, status
        self.length = len(body) if length is None else length


def choice(content: Any, finish: str = "stop", **message: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": content, **message}, "finish_reason": finish}]}


class Endpoint:
    """A server that answers each request by `plan`: an error, bytes, a document, or the content of
    one; None closes the connection."""

    def __init__(self) -> None:
        self.plan: list[Any] | Callable[[dict[str, Any]], Any] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.open = self.most_open = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.bodies.append({"path": self.path, **body})
                    outer.keys.append(self.headers["Authorization"])
                    outer.open += 1
                    outer.most_open = max(outer.most_open, outer.open)
                step = outer.plan(body) if callable(outer.plan) else outer.plan.pop(0)
                with outer.lock:
                    outer.open -= 1
                if step is not None:
                    self.answer(step)

            def answer(self, step: Any) -> None:
                headers: dict[str, str] = {}
                if isinstance(step, Raw):
                    status, body, length = step.status, step.body, step.length
                else:
                    error = step if isinstance(step, Error) else None
                    status, headers = (error.status, error.headers) if error else (200, {})
                    document = step if isinstance(step, dict) else choice(step)
                    body = json.dumps(error.document if error else document).encode()
                    length = len(body)
                self.send_response(status)
                for name, value in {"Content_Length": str(length), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that has gone away is no error of the test."""

        self.server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


def by_reply(answer: Callable[[str], Any], *, at_once: int = 1) -> Callable[[dict[str, Any]], Any]:
    """A plan by the judged reply; requests wait for each other until `at_once` have come."""
    barrier = threading.Barrier(at_once)

    def plan(body: dict[str, Any]) -> Any:
        barrier.wait(30)
        question = body["messages"][0]["content"]
        return answer(question.split("Reply:\n> ")[1].split("\n")[0])

    return plan


def verdict_word(reply: str) -> str:
    return "UNSAFE" if reply.startswith("bad") else "SAFE"


@contextmanager
def serving() -> Iterator[Endpoint]:
    server = Endpoint()
    try:
        yield server
    finally:
        server.server.shutdown()
        server.server.server_close()


def judge_at(url: str, tmp_path: Path, **options: Any) -> EndpointJudge:
    settings: dict[str, Any] = {"key": "secret", "wait": 0.0, **options}
    return EndpointJudge("judge-1", url, cache=tmp_path / "judge.db", **settings)


def rows(tmp_path: Path) -> list[tuple[str]]:
    """Keys of the answers that are kept."""
    with sqlite3.connect(tmp_path / "judge.db") as connection:
        return connection.execute("SELECT key FROM texts").fetchall()
