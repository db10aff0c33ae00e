"""What an artifact recommends and why, in words, for the commands that write, show or use one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from cmrm.shift.artifact import ShiftVectors
    from cmrm.steering.setting import Steering

WITHOUT_BENIGN = (
    "with benign anchors (--benign SET) the artifact would hold a refusal direction, a harm gate "
    "and sequential vectors too, and a recommendation that is measured, also whether there is a gap"
)


def sentences(shift: ShiftVectors, *, named: bool) -> list[str]:
    """What is recommended, why, and how well the gate does on anchors that it was not fitted on.

    `named`: the setting is the user's own.
    """
    gap, gate = shift.records.get("gap"), shift.records.get("gate")
    measured = gap is not None and gate is not None
    how = (
        ", as the options say"
        if named
        else ""
        if measured
        else ", with caution since nothing was measured"
    )
    lines = [f"recommended{how}: {setting_in_words(shift)}"]
    if gap is None or gate is None:
        return [*lines, WITHOUT_BENIGN]
    lines.append(f"{'by the anchors' if named else 'why'}: {gap['reason']}")
    lines.append(f"gap: {gap_in_words(gap)}")
    layer, area = gate["layer"], gate["auc"][gate["layer"]]
    lines.append(
        f"gate: reads decoder layer {layer} (AUC {area:.3f}); on anchors that it was not fitted on "
        f"it opens for {share(gate['recall'])} of the harmful and {share(gate['false_alarms'])} "
        f"of the benign ones ({share(gate['wanted_false_alarms'])} were asked for)"
    )
    lines.append(f"gate on image questions: {questions_in_words(gate)}")
    return lines


def setting_in_words(shift: ShiftVectors) -> str:
    """The recommended setting of an artifact, with the layers that it comes to."""
    from cmrm.errors import InputError
    from cmrm.shift.resolve import settled

    use = shift.recommended
    if use.alpha == 0:
        return "nothing (alpha 0)"
    try:
        layers = layers_in_words(settled(shift).layers)
    except InputError as error:
        return f"a setting that this artifact cannot be used with: {error}"
    what = {
        "fill": "fill along the refusal direction",
        "sequential": "sequential vectors are added",
        "shift": f"{use.schedule} vectors are added",
    }[use.kind]
    gated = ", where the gate opens" if use.gate else ""
    return f"{what}, {layers}, alpha {use.alpha:g}, positions {use.positions}{gated}"


def layers_in_words(layers: Sequence[int] | None) -> str:
    """`decoder layers 0-8, 12`, or `all decoder layers` for None."""
    if layers is None:
        return "all decoder layers"
    from cmrm.steering.setting import layer_ranges

    return f"decoder layer{'s' if len(layers) != 1 else ''} {layer_ranges(layers)}"


def gap_in_words(gap: Mapping[str, Any]) -> str:
    """How much of the refusal direction the corrupted image takes."""
    return (
        f"the corrupted image takes {share(gap['lost'])} of the refusal direction "
        f"[{share(gap['low'])}, {share(gap['high'])}]; as text, harmful and benign anchors are "
        f"told apart with an AUC of {gap['text_auc']:.3f}"
    )


def questions_in_words(gate: Mapping[str, Any]) -> str:
    """What share of image questions a gate would touch."""
    if gate["questions"] is None:
        return "not measured (--questions SET measures what share of them it touches)"
    return f"it opens for {share(gate['questions'])} of {gate['n_questions']}"


def share(value: float) -> str:
    """A share as per cent."""
    return f"{100 * value:.1f} %"


def print_nothing_recommended(shift: ShiftVectors, used: Mapping[str, Steering]) -> None:
    """One line on standard error where an artifact recommends alpha 0.

    `used`: settings by the name of what uses them; what has alpha 0 leaves the model as it is.
    """
    if shift.recommended.alpha > 0 or not used:
        return
    reason = shift.records.get("gap", {}).get("reason")
    line = "the artifact recommends alpha 0" + (f": {reason}" if reason else "")
    idle = [name for name, setting in used.items() if setting.alpha == 0]
    steered = [f"{name} at alpha {s.alpha:g}" for name, s in used.items() if s.alpha > 0]
    if idle:
        verb = "leaves" if len(idle) == 1 else "leave"
        line += f"; {' and '.join(idle)} {verb} the model as it is, another alpha steers it"
    if steered:
        line += f"; steered all the same: {', '.join(steered)}"
    typer.echo(line, err=True)
