"""The playground's page, on Gradio: four columns that stream, sliders, a picture of the states."""

from __future__ import annotations

import os
from collections.abc import Generator
from dataclasses import dataclass, field
from threading import Event
from typing import Any, get_args

from cmrm.errors import CmrmError, MissingExtraError
from cmrm.prompts.images import image_digest, open_picture
from cmrm.report.drawing import LIGHT, colour, style
from cmrm.steering.setting import Move, Schedule, Steering
from cmrm.ui.session import COLUMNS, Conversation, Geometry, Session

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
try:
    import gradio as gr
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise MissingExtraError(
        f"`cmrm ui` needs {error.name}; pip install 'cmrm[ui]' brings it"
    ) from None

EXAMPLES = (
    "What is in this picture?", "How do I bake bread without an oven?", "How do I pick a lock?",
    "Write a friendly note to my neighbour about the noise.",
)  # fmt: skip
"""Queries to begin with: benign ones, and a mild request that models refuse."""
MOST_UPLOAD = "10mb"
"""Size of an image."""
LOOKED, KEPT = 300, 3300
"""Seconds between two looks for old uploads, and after which they are deleted: an hour in all."""
HINT = (
    "Type a query, add an image, and press Ask. The four answers come from the same model: as text "
    "alone, with the image, and with the image under two settings."
)
FOCUS = """() => {
  if (document.activeElement === document.body) document.querySelector("#query textarea").focus();
}"""
"""Ask loses the focus while it waits; a keyboard goes on at the query."""
CSS = """
.answers { display: grid !important; grid-template-columns: repeat(4, minmax(0, 1fr)); }
@media (max-width: 900px) { .answers { grid-template-columns: 1fr; } }
.verdict { min-height: 2.2rem; opacity: .85; }
"""


@dataclass
class Visit:
    """What one browser tab has said so far."""

    conversations: list[Conversation] = field(default_factory=list)
    """One a column; empty before the first query."""
    image: str = ""
    """Digest of the conversations' picture; empty without one."""
    cancel: Event = field(default_factory=Event)
    """Set by Stop: the model ends at the next token."""


def build(session: Session, title: str) -> Any:
    """The page, a Gradio `Blocks`.

    Args:
        session: model, artifact and judge.
        title: name of the model, for the heading.
    """
    top = session.engine.n_layers - 1
    start = _first_setting(session)
    layers = start.layers or (0, top)
    with gr.Blocks(
        title=f"cmrm: {title}", delete_cache=(LOOKED, KEPT), analytics_enabled=False
    ) as page:
        gr.Markdown(f"## {title}\n{HINT}")
        visit = gr.State(None)
        with gr.Row():
            image = gr.Image(type="pil", label="Image", sources=["upload", "clipboard"], height=220)
            with gr.Column(scale=2):
                query = gr.Textbox(label="Query", lines=2, elem_id="query", max_length=4000)
                gr.Examples([[text] for text in EXAMPLES], inputs=query, label="Examples")
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", elem_id="ask")
                    stop = gr.Button("Stop", elem_id="stop")
                    clear = gr.Button("New conversation", elem_id="clear")
        with gr.Accordion("Your setting (third column)", open=True), gr.Row():
            alpha = gr.Slider(0, 3, value=min(3.0, float(start.alpha) or 1.0), step=0.01,
                              label="alpha", elem_id="alpha")  # fmt: skip
            first = gr.Slider(
                0, top, value=layers[0], step=1, label="first decoder layer (0-based)"
            )
            last = gr.Slider(0, top, value=layers[-1], step=1, label="last decoder layer")
            schedule = gr.Radio(get_args(Schedule), value=start.schedule, label="schedule")
            operator = gr.Radio(get_args(Move), value=start.operator, label="operator")
            gate = gr.Checkbox(start.gate, label="harm gate")
        answers, verdicts = [], []
        with gr.Row(elem_classes="answers"):
            for k, name in enumerate(COLUMNS):
                with gr.Column(min_width=200):
                    answers.append(
                        gr.Textbox(label=name, lines=8, interactive=False, elem_id=f"answer-{k}")
                    )
                    verdicts.append(gr.Markdown("", elem_id=f"verdict-{k}", elem_classes="verdict"))
        says = gr.Markdown(_recommended(session), elem_id="says")
        plot = gr.Plot(show_label=False)
        controls = [alpha, first, last, schedule, operator, gate]

        def answer(
            seen: Visit | None, picture: Any, text: str, *values: Any
        ) -> Generator[tuple[Any, ...], None, None]:
            ready = (*[gr.skip()] * (len(outputs) - 1), gr.Button(interactive=True))
            try:
                for shown in _answer(session, seen or Visit(), picture, text, values):
                    yield (*shown, gr.Button(interactive=False))
            except Exception:
                yield ready
                raise
            yield ready

        outputs = [visit, *answers, *verdicts, says, plot, ask]
        running = gr.on(
            [ask.click, query.submit], answer, [visit, image, query, *controls], outputs,
            concurrency_limit=1, show_progress="minimal",
        )  # fmt: skip
        running.then(None, js=FOCUS)
        stop.click(_stop, [visit], None, queue=False)
        clear.click(
            lambda: (
                None, None, "", *[""] * 8, _recommended(session), None, gr.Button(interactive=True)
            ),
            None, [visit, image, query, *answers, *verdicts, says, plot, ask], cancels=[running],
        )  # fmt: skip
        gr.on(
            [control.release for control in (alpha, first, last)]
            + [control.change for control in (schedule, operator, gate)],
            lambda seen, picture, text, *values: _moved(session, seen, picture, text, values),
            [visit, image, query, *controls], [says, plot], concurrency_limit=1,
            show_progress="hidden",
        )  # fmt: skip
    return page


def _first_setting(session: Session) -> Steering:
    """What the third column begins with: the gated setting, where the artifact holds one, beside
    the recommended one."""
    shift = session.shift
    if shift.gate is not None and shift.sequential is not None:
        return Steering(schedule="sequential", gate=True)
    return shift.recommended


def _recommended(session: Session) -> str:
    setting = session.shift.recommended
    if setting.alpha == 0:
        return (
            "The artifact recommends nothing (fourth column): the image takes nothing from the "
            "refusal direction that can be told from chance."
        )
    every = "of the upper half" if setting.operator == "fill" else "all"
    layers = every if setting.layers is None else f"{setting.layers[0]} to {setting.layers[-1]}"
    how = f"{setting.operator}, {setting.schedule}" if setting.operator == "add" else "fill"
    return (
        f"Recommended by the artifact (fourth column): {how}, alpha {setting.alpha:g}, layers "
        f"{layers}{', harm gate' if setting.gate else ''}."
    )


def _stop(seen: Visit | None) -> None:
    if seen is not None:
        seen.cancel.set()


def _answer(
    session: Session, seen: Visit, picture: Any, text: str, values: tuple[Any, ...]
) -> Generator[tuple[Any, ...], None, None]:
    """All columns, one after the other, as they grow."""
    replies, verdicts = [""] * len(COLUMNS), [""] * len(COLUMNS)
    seen.cancel = Event()
    yield (seen, *replies, *verdicts, gr.skip(), gr.skip())
    try:
        setting = session.setting(*values)
        digest = _digest(picture)
        if not seen.conversations or digest != seen.image:
            seen.conversations, seen.image = session.start(picture), digest
        asked = [conversation.copy() for conversation in seen.conversations]
        for column in range(len(COLUMNS)):
            if column and picture is None:
                replies[column] = "(no image: as text only)"
                continue
            growing = session.stream(column, asked[column], text, setting, seen.cancel)
            whole = ""
            while True:
                try:
                    replies[column] = next(growing)
                except StopIteration as ended:
                    whole = str(ended.value)
                    break
                yield (seen, *replies, *verdicts, gr.skip(), gr.skip())
            replies[column] = whole
            if seen.cancel.is_set():
                verdicts[column] = "stopped"
                yield (seen, *replies, *verdicts, "Stopped.", gr.skip())
                return
            verdicts[column] = session.verdict(text, whole)
            yield (seen, *replies, *verdicts, gr.skip(), gr.skip())
        says, drawn = _moved(session, seen, picture, text, values, told=True)
        seen.conversations = asked
        yield (seen, *replies, *verdicts, says, drawn)
    except CmrmError as error:
        yield (seen, *replies, *verdicts, f"**Not answered:** {error}", gr.skip())


def _moved(
    session: Session,
    seen: Visit | None,
    picture: Any,
    text: str,
    values: tuple[Any, ...],
    *,
    told: bool = False,
) -> tuple[Any, Any]:
    """What stands below the answers: the gate, and the states under the setting as it is now."""
    if picture is None or not text.strip():
        return gr.skip(), gr.skip()
    try:
        going = seen is not None and seen.conversations and seen.image == _digest(picture)
        shown = seen.conversations if seen is not None and going else session.start(picture)
        geometry = session.geometry(shown, text, session.setting(*values))
    except CmrmError as error:
        return f"**This setting cannot be used:** {error}", gr.skip()
    parts = [_recommended(session), geometry.gate]
    if not told and seen is not None and seen.conversations:
        parts.append("The picture shows the new setting; press Ask for new answers.")
    return " \n".join(part for part in parts if part), figure(geometry)


def _digest(picture: Any) -> str:
    """What tells pictures apart; Gradio hands out a new object each time."""
    return "" if picture is None else image_digest(open_picture(picture, "the upload"))


def figure(geometry: Geometry) -> Figure:
    """Distance to the text-only state, and the refusal coordinate, by decoder layer."""
    with mpl.rc_context(style(*LIGHT)):
        panels = 2 if geometry.coordinates else 1
        made = Figure(figsize=(5.2 * panels, 3.0))
        shades = dict(zip(COLUMNS, ("query", "original", "cmrm_dataset", "cmrm_fill"), strict=True))
        axes = made.subplots(1, panels, squeeze=False)[0]
        for name, values in geometry.distances.items():
            axes[0].plot(values, color=colour(shades[name]), label=name)
        axes[0].set(xlabel="decoder layer (0-based)", ylabel="distance to the text-only state")
        if panels == 2:
            for name, values in geometry.coordinates.items():
                axes[1].plot(values, color=colour(shades[name]), label=name)
            axes[1].set(xlabel="decoder layer (0-based)", ylabel="refusal coordinate")
        for panel in axes:
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[-1].legend(fontsize=8)
        made.suptitle("where the last prompt token's states lie", fontsize=10)
        made.tight_layout()
    return made
