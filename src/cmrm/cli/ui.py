"""`cmrm ui`: the playground in a browser, on this machine alone unless it is said otherwise."""

from __future__ import annotations

from typing import Annotated

import typer

from cmrm.cli import options as c
from cmrm.cli import screen


def ui(
    model: c.ModelArgument,
    shift: Annotated[
        str | None,
        typer.Option(help="Artifact of `cmrm extract`; demo: fitted on its anchors when left out."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address; beyond loopback --auth is needed.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port.")] = 7860,
    auth: Annotated[
        str | None,
        typer.Option(help="USER:PASSWORD that visitors log in with.", envvar="CMRM_AUTH"),
    ] = None,
    judge: Annotated[str, typer.Option(help="Judge of the answers.")] = "small",
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of a reply.")] = 96,
    revision: c.RevisionOption = None,
    dtype: c.DtypeOption = "auto",
    device_map: c.DeviceOption = None,
    trust_remote_code: c.TrustOption = False,
) -> None:
    """Ask side by side: as text, with an image, under your setting, under the recommended one.

    Sliders and switches change the setting; the judge's verdict stands under each answer, and a
    picture shows where the states lie. Stop ends the model's reply.
    """
    c.need_extra("`cmrm ui`", "ui", ("gradio", "matplotlib", "sklearn"))
    from cmrm.cli.serve import is_loopback
    from cmrm.errors import InputError

    if max_new_tokens < 1 or not 1 <= port <= 65535:
        raise InputError("--max-new-tokens is at least 1, and --port within 1..65535")
    user, colon, password = (auth or "").partition(":")
    if auth is not None and not (user and colon and len(password) >= 8):
        raise InputError("--auth is USER:PASSWORD, with a password of 8 characters or more")
    if not is_loopback(host) and auth is None:
        raise InputError(f"{host} can be reached from other machines: name --auth USER:PASSWORD")
    if shift is None and model != c.DEMO:
        raise InputError(
            "name an artifact with --shift; cmrm extract MODEL --anchors ... makes one"
        )
    from cmrm.judges import make_judge
    from cmrm.shift.artifact import ShiftVectors

    made = make_judge(judge)
    artifact = None if shift is None else ShiftVectors.from_pretrained(shift)
    vlm = c.open_model(
        model, revision=revision, dtype=dtype, device_map=device_map,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    from cmrm.engines.transformers import TransformersEngine
    from cmrm.ui.app import CSS, MOST_UPLOAD, build
    from cmrm.ui.session import Session

    engine = TransformersEngine(vlm)
    if artifact is None:
        from cmrm.demo.levels import shift_of_cache

        with screen.progress(None) as (say, _):
            say("fitting on the demo's anchors, once")
            artifact = shift_of_cache(engine)
    page = build(Session(engine, artifact, made, max_new_tokens), model)
    page.queue(default_concurrency_limit=1).launch(
        server_name=host, server_port=port, auth=(user, password) if auth else None, css=CSS,
        max_file_size=MOST_UPLOAD, share=False, show_error=True, quiet=False,
    )  # fmt: skip
