"""`cmrm serve`: vLLM's own OpenAI-compatible server, or transformers', armed, with safe
defaults."""

from __future__ import annotations

import ipaddress
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmrm.cli import options as c
from cmrm.cli import screen

if TYPE_CHECKING:
    from cmrm.shift.artifact import ShiftVectors
    from cmrm.steering.setting import Steering

NOWHERE = "none.invalid"
"""A domain that cannot exist: the only one from which images may be fetched by default."""
ENGINES = ("vllm", "transformers")
MOST_IMAGES = 4
MOST_REPLIES = 16
"""To one request (`n`), unless the environment says otherwise; vLLM allows 16,384."""
DRAIN = 20
"""Seconds in which requests in flight are answered after SIGTERM. With 0, vLLM's default, its
engine can be gone while its server waits for them without end."""
SERVER_MODULES = ("fastapi", "uvicorn", "openai", "pydantic")
"""What transformers' server needs."""
OWN = (
    "--model", "--served-model-name", "--host", "--port", "--api-key", "--middleware",
    "--trust-remote-code", "--limit-mm-per-prompt", "--allowed-media-domains",
    "--allowed-local-media-path", "--enable-lora", "--speculative-config",
    "--pipeline-parallel-size", "-pp", "--enable-prompt-embeds", "--config",
)  # fmt: skip
"""Options of vLLM that are set here, or under which steering was not shown to be right."""


def serve(
    model: c.ModelArgument,
    shift: Annotated[
        str,
        typer.Option(
            help="Artifact of `cmrm extract` (file, folder, hub id); `demo`: the demo VLM's own."
        ),
    ],
    engine: Annotated[
        str,
        typer.Option(help="The server: vllm, or transformers, which runs one request at a time."),
    ] = "vllm",
    host: Annotated[str, typer.Option(help="Address; beyond loopback an API key is needed.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(help="Key that clients send.", envvar="CMRM_API_KEY")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model for clients; default: MODEL.")
    ] = None,
    max_images: Annotated[int, typer.Option(help="Images a request.")] = MOST_IMAGES,
    image_domains: Annotated[
        str | None,
        typer.Option(help="Comma list of domains that images may be fetched from; default: none."),
    ] = None,
    alpha: c.AlphaOption = None,
    schedule: c.ScheduleOption = None,
    positions: c.PositionsOption = None,
    layers: c.LayersOption = None,
    operator: c.OperatorOption = None,
    gate: c.GateOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of --engine transformers: auto (the default), float32, bfloat16 or float16."
        ),
    ] = None,
    device_map: Annotated[
        str | None,
        typer.Option(
            help="Of --engine transformers: where the model runs, as accelerate takes it."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print vLLM's command and its environment, and stop.")
    ] = False,
    more: Annotated[
        list[str] | None, typer.Argument(help="Further options of vLLM's server, after --.")
    ] = None,
) -> None:
    """Serve a model whose requests with an image are steered; text-only requests are not.

    vLLM answers (OpenAI's protocol), in an environment of its own: tools/vllm_env.sh,
    docs/engines.md. On a machine without vLLM, --engine transformers does. `/health` says whether
    steering is armed, `/metrics` counts steered tokens.
    """
    from cmrm.engines.vllm.checkpoint import readable_by_vllm
    from cmrm.engines.vllm.matching import check_checkpoint
    from cmrm.engines.vllm.program import Program
    from cmrm.engines.vllm.starting import need_vllm
    from cmrm.errors import InputError
    from cmrm.model.vlm import checkpoint_folder
    from cmrm.shift.artifact import ShiftVectors
    from cmrm.shift.resolve import settled

    if engine not in ENGINES:
        raise InputError(f"--engine is {engine!r}; one of {', '.join(ENGINES)}")
    options = list(more or ())
    _check(host, port, api_key, max_images, options)
    if shift == c.DEMO:
        shift = _demo_shift(model)
    vectors = ShiftVectors.from_pretrained(shift)
    named: dict[str, Any] = {
        "alpha": alpha, "schedule": schedule, "positions": positions, "layers": layers,
        "operator": operator, "gate": gate,
    }  # fmt: skip
    setting = settled(vectors, c.changed(vectors.recommended, **named))
    if setting.alpha == 0:
        raise InputError(
            "alpha is 0, which leaves the model as it is; serve it without cmrm, or name --alpha"
        )
    if engine == "transformers":
        only_vllm = {
            "--image-domains": image_domains, "--dry-run": dry_run, "options after --": options,
        }  # fmt: skip
        _check_own(only_vllm, "vllm")
        loading = {"dtype": dtype or "auto", "device_map": device_map}
        _serve_transformers(
            model, vectors, setting, loading, host=host, port=port, name=name or model,
            api_key=api_key, max_images=max_images,
        )  # fmt: skip
        return
    _check_own({"--dtype": dtype, "--device-map": device_map}, "transformers")
    program = Program.of(vectors, setting)
    if not dry_run:
        need_vllm("`cmrm serve`")
    folder = readable_by_vllm(checkpoint_folder(model))
    command, environment = _command(
        folder, name or model, shift, setting, host=host, port=port, api_key=api_key,
        max_images=max_images, domains=image_domains, options=options,
    )  # fmt: skip
    if not dry_run:
        check_checkpoint(folder, vectors.identity)
        _check_parsed(command, fills=bool(program.fills))
    if dry_run:
        shown = [
            f"{key}={'***' if key == 'VLLM_API_KEY' else quote(value)}"
            for key, value in environment.items()
        ]
        typer.echo(" \\\n  ".join([*shown, *map(quote, command)]))
        return
    os.execve(command[0], command, {**os.environ, **environment})


def _check_own(options: Mapping[str, Any], engine: str) -> None:
    """Refuse options of another engine.

    Raises:
        InputError: one is given.
    """
    from cmrm.errors import InputError

    foreign = [name for name, value in options.items() if value]
    if foreign:
        raise InputError(f"{foreign[0]}: this goes with --engine {engine} alone")


def _serve_transformers(
    model: str,
    vectors: ShiftVectors,
    setting: Steering,
    loading: Mapping[str, Any],
    *,
    host: str,
    port: int,
    name: str,
    api_key: str | None,
    max_images: int,
) -> None:
    """Serve until a signal ends it.

    Raises:
        MissingExtraError: fastapi, uvicorn, openai or pydantic are missing. InputError,
            ArtifactError, ModelError: the model cannot be served with this artifact.
    """
    c.need_extra("`cmrm serve --engine transformers`", "serve", SERVER_MODULES)
    from cmrm.engines.serving.steered import Steered
    from cmrm.engines.serving.transformers_server import application, bound, run
    from cmrm.engines.transformers import TransformersEngine

    with bound(host, port) as listener:  # before minutes of loading
        with screen.progress(None) as (say, _):
            say("loading the model, and testing its steering")
            steered = Steered(TransformersEngine(c.open_model(model, **loading)), vectors, setting)
        app = application(steered, name, key=api_key, most_images=max_images)
        status, shown = steered.status(), f"[{host}]" if ":" in host else host
        typer.echo(
            f"cmrm: serving {name} at http://{shown}:{port}/v1, {status['layers']} of "
            f"{steered.vlm.n_layers} decoder layers steered, positions {status['positions']}, "
            f"{'with' if status['gated'] else 'without'} the harm gate",
            err=True,
        )
        run(app, listener, DRAIN)


def _check_parsed(command: Sequence[str], *, fills: bool) -> None:
    """Refuse what vLLM's own parser makes of the options, where it undoes a safe default, or where
    the program `fills` and cannot under it.

    Raises:
        InputError: it does; abbreviated and dotted options are known to it.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from cmrm.errors import InputError

    start = command.index("-m") + 2
    parsed = vars(make_arg_parser(FlexibleArgumentParser()).parse_args(list(command[start:])))
    own = vars(
        make_arg_parser(FlexibleArgumentParser()).parse_args(
            list(command[start : command.index("--middleware") + 2])
        )
    )
    fixed = (
        "host", "port", "uds", "api_key", "trust_remote_code", "limit_mm_per_prompt", "middleware",
        "allowed_media_domains", "allowed_local_media_path", "model", "served_model_name",
        "worker_cls", "worker_extension_cls", "kv_transfer_config", "ec_transfer_config",
        "enable_sleep_mode", "root_path", "enable_lora", "speculative_config",
        "pipeline_parallel_size", "enable_prompt_embeds", "trust_request_chat_template",
        "ubatch_size", "enable_dbo", "hf_overrides", "tokenizer", "disable_fastapi_docs",
    )  # fmt: skip
    changed_options = [name for name in fixed if parsed.get(name) != own.get(name)]
    if changed_options:
        raise InputError(
            f"--{changed_options[0].replace('_', '-')} is set by `cmrm serve`, or steering was not "
            "shown to be right under it"
        )
    if fills and parsed["data_parallel_size"] > 1:
        raise InputError(
            "`fill` is not built for --data-parallel-size: a text and its image request could run "
            "in different engines. Start several `cmrm serve`, or serve the harm gate instead: "
            "--operator add --schedule sequential --gate"
        )


def _demo_shift(model: str) -> str:
    """File of the demo VLM's artifact; fitted once, on the demo's anchors.

    Raises:
        InputError: the model is another one.
    """
    from cmrm.errors import InputError

    if model != c.DEMO:
        raise InputError("the artifact `demo` belongs to the model `demo` alone")
    from cmrm.demo.levels import cached_shift, shift_of_cache

    if not cached_shift().is_file():
        from cmrm.demo.vlm import load_demo
        from cmrm.engines.transformers import TransformersEngine

        with screen.progress(None) as (say, _):
            say("fitting on the demo's anchors, once")
            shift_of_cache(TransformersEngine(load_demo()))
    return str(cached_shift())


def _check(
    host: str, port: int, api_key: str | None, max_images: int, options: Sequence[str]
) -> None:
    """Refuse what is not safe, or not known to be right.

    Raises:
        InputError: it is such a thing.
    """
    from cmrm.errors import InputError

    if not 1 <= port <= 65535:
        raise InputError(f"--port is {port}; it is within 1..65535")
    if max_images < 1:
        raise InputError(f"--max-images is {max_images}; it is at least 1")
    if not is_loopback(host) and not api_key:
        raise InputError(
            f"{host} can be reached from other machines: name --api-key (or CMRM_API_KEY), or "
            "serve on 127.0.0.1"
        )
    if api_key is not None and len(api_key) < 8:
        raise InputError("--api-key has fewer than 8 characters")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise InputError("--api-key has characters that a header cannot carry; use ASCII letters")
    for option in options:
        name = option.split("=", 1)[0].replace("_", "-")
        if name in OWN:
            raise InputError(
                f"{name} is set by `cmrm serve`, or steering was not shown to be right under it"
            )


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _command(
    folder: Path,
    name: str,
    shift: str,
    setting: Steering,
    *,
    host: str,
    port: int,
    api_key: str | None,
    max_images: int,
    domains: str | None,
    options: Sequence[str],
) -> tuple[list[str], Mapping[str, str]]:
    """vLLM's command, and what is added to its environment."""
    from cmrm.engines.vllm.starting import with_cache, with_plugin

    allowed = [NOWHERE] if domains is None else c.parse_names(domains, "--image-domains")
    limits = json.dumps({"image": max_images, "video": 0, "audio": 0})
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--served-model-name", name, "--host", host, "--port", str(port),
        "--limit-mm-per-prompt", limits, "--allowed-media-domains", *allowed,
        "--middleware", "cmrm.engines.vllm.http.Middleware",
        "--shutdown-timeout", str(DRAIN), *options,
    ]  # fmt: skip
    environment = {
        "CMRM_SHIFT": shift if not Path(shift).exists() else str(Path(shift).resolve()),
        "CMRM_STEERING": json.dumps(setting.to_json()),
        "CMRM_REMEMBERS": "1",
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_SERVER_DEV_MODE": "0",
        "VLLM_MAX_N_SEQUENCES": os.environ.get("VLLM_MAX_N_SEQUENCES", str(MOST_REPLIES)),
        **with_plugin(os.environ),
        **with_cache(os.environ, options),
    }
    if api_key is not None:
        environment["VLLM_API_KEY"] = api_key
    return command, environment
