"""vLLM's start: is it here, in a tested version, with the plugin; and an engine that takes
programs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cmrm.engines.base import EngineError
from cmrm.errors import CmrmError, InputError, MissingExtraError, ModelError

SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
"""Environment of vLLM in this process: its engine runs here, its first model runner."""
GROUP, PLUGIN = "vllm.general_plugins", "cmrm"
"""Entry point of the plugin."""


def need_vllm(purpose: str) -> None:
    """Check that vLLM is here, in a version that is tested, and would load the plugin.

    Raises:
        MissingExtraError: it is not here. InputError: the version is not tested, or the plugin is
            not installed.
    """
    if find_spec("vllm") is None:
        raise MissingExtraError(
            f"{purpose} needs vLLM in the same environment: run tools/vllm_env.sh FOLDER, then "
            "FOLDER/bin/cmrm (docs/engines.md)"
        )
    from cmrm.engines.vllm.patches import check_version

    check_version()
    if PLUGIN not in {point.name for point in entry_points(group=GROUP)}:
        raise InputError(
            "vLLM would not load the plugin of cmrm, which is not installed in this environment: "
            "pip install cmrm there"
        )


def with_plugin(environment: Mapping[str, str]) -> dict[str, str]:
    """What has to be added to an environment whose `VLLM_PLUGINS` leaves the plugin out."""
    named = environment.get("VLLM_PLUGINS")
    if named is None or PLUGIN in named.split(","):
        return {}
    return {"VLLM_PLUGINS": ",".join([*filter(None, named.split(",")), PLUGIN])}


CACHE = "VLLM_CPU_KVCACHE_SPACE"
"""GiB that vLLM takes on a CPU for keys and values; without it vLLM wants 92 % of the memory, and
does not start where anything else runs."""
CACHE_OPTIONS = {"gpu-memory-utilization", "kv-cache-memory-bytes"}
"""Options of vLLM that say the same."""
MOST_CACHE = 16
"""GiB that are taken unasked."""


def with_cache(environment: Mapping[str, str], options: Iterable[str]) -> dict[str, str]:
    """What has to be added to an environment in which nobody says how much memory a CPU gives to
    keys and values: a quarter of it. Elsewhere vLLM ignores it.

    `options`: names of vLLM's options that are set, with `-` or `_`.
    """
    named = {option.lstrip("-").split("=", 1)[0].replace("_", "-") for option in options}
    if CACHE in environment or named & CACHE_OPTIONS:
        return {}
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {CACHE: str(min(MOST_CACHE, max(1, int(whole / 4))))}


def started(folder: Path, options: Mapping[str, Any]) -> Any:
    """A `vllm.LLM` on a checkpoint, eager, that takes programs (`arming.arm_again`).

    Raises:
        InputError: vLLM does not take an option. ModelError: it does not start.
        EngineError: an artifact arms vLLM in this process already.
    """
    from cmrm.engines.vllm.arming import is_armed_with_artifact

    if is_armed_with_artifact():
        raise EngineError("CMRM_SHIFT arms vLLM in this process; unset it, and pass the artifact")
    values = {
        **SETTINGS, **with_plugin(os.environ), **with_cache(os.environ, options),
        "CMRM_PROGRAMS": "1",
    }  # fmt: skip
    with _environment(values):
        from vllm import LLM

        try:
            return LLM(
                model=str(folder), enforce_eager=True, disable_log_stats=True,
                mm_processor_cache_gb=0, **options,
            )  # fmt: skip
        except TypeError as error:
            raise InputError(f"vLLM does not take an option: {one_line(error)}") from error
        except CmrmError:
            raise
        except Exception as error:  # whatever vLLM raises while it loads a stranger's checkpoint
            raise ModelError(f"vLLM cannot load {folder}: {one_line(error)}") from error


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def one_line(error: BaseException) -> str:
    """An error on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
