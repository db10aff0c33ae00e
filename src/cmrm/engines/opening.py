"""Which engine a name means: `transformers`, `vllm`, or the address of a server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmrm.engines.base import Engine
from cmrm.engines.transformers import TransformersEngine
from cmrm.errors import InputError
from cmrm.model.vlm import load_vlm

LOCAL = ("transformers", "vllm")
"""Engines in this process."""
SERVER_OPTIONS = ("parallel", "timeout")
"""Options of `EndpointEngine`."""


def open_engine(
    model: str,
    engine: str = "transformers",
    engine_options: Mapping[str, Any] | None = None,
    **loading: Any,
) -> Engine:
    """The engine that answers as `model`.

    Args:
        model: folder, hub id or registered name; of a server the name that it serves.
        engine: `transformers`, `vllm`, or addresses of OpenAI-compatible servers, comma-separated:
            replicas of one model.
        engine_options: of `vllm.LLM` or of `EndpointEngine`; the engine on transformers has none.
        loading: `dtype`, `device_map`, `revision`, `trust_remote_code` of `load_vlm`.

    Raises:
        InputError: the name is unknown, or an option does not go with the engine.
        ModelError, EngineError, MissingExtraError: the model cannot be loaded or reached.
    """
    options = dict(engine_options or {})
    if engine == "transformers":
        if options:
            raise InputError("--engine-options go with the engine vllm or a server's address")
        return TransformersEngine(load_vlm(model, **loading))
    check_engine(engine)
    named = {name: value for name, value in loading.items() if value not in (None, False, "auto")}
    if engine == "vllm":
        refused = sorted(set(named) - {"dtype", "revision"})
        if refused:
            raise InputError(f"{refused[0]} does not go with the engine vllm")
        from cmrm.engines.vllm.engine import OWN, VllmEngine

        taken = sorted(OWN & set(options))
        if taken:
            raise InputError(f"--engine-options: {taken[0]} is set by cmrm; leave it out")
        return VllmEngine(model, **named, **options)
    if named:
        raise InputError(f"{min(named)} is the server's to choose; it does not go with an address")
    unknown = sorted(set(options) - set(SERVER_OPTIONS))
    if unknown:
        raise InputError(
            f"--engine-options: {unknown[0]} is none of a server's; those are "
            f"{' and '.join(SERVER_OPTIONS)}"
        )
    from cmrm.engines.endpoint import EndpointEngine

    return EndpointEngine(model, [part.strip() for part in engine.split(",")], **options)


def check_engine(engine: str) -> None:
    """Refuse a name that means no engine.

    Raises:
        InputError: it is neither an engine's name nor an address.
    """
    if engine in LOCAL:
        return
    wrong = [
        part for part in engine.split(",") if not part.strip().startswith(("http://", "https://"))
    ]
    if wrong:
        raise InputError(
            f"--engine is {wrong[0].strip()!r}; it is {', '.join(LOCAL)}, or the address of a "
            "server, such as http://127.0.0.1:8000/v1"
        )


def engine_options_of(text: str | None) -> dict[str, Any]:
    """Options from JSON, or from a file of JSON.

    Raises:
        InputError: it is no JSON object.
    """
    if text is None:
        return {}
    try:
        content = text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8")
        options = json.loads(content)
    except (OSError, ValueError) as error:
        raise InputError(f"--engine-options is neither JSON nor a file of it: {error}") from None
    if not isinstance(options, dict):
        raise InputError('--engine-options is no JSON object, such as {"max_model_len": 4096}')
    return options
