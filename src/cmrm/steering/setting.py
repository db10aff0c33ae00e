"""How shift vectors are applied: the one set of fields, checked once, and named presets.

After decoder block l:  h <- h + alpha * delta_l  at the chosen positions of rows that contain an
image.

| schedule | delta_l | total displacement at layer l, to first order |
|---|---|---|
| `telescoped` | v_l - v_(previous chosen layer), the first one v_l | v_l |
| `per_layer` | v_l, the paper's letter | sum of all v up to l |
| `sequential` | mean of h_t,l - h'_c,l with all lower chosen layers steered | exactly v_l |

| positions | steered |
|---|---|
| `last` | the last prompt token of a turn and every generated token |
| `all` | every position, prompt and generated |
| `after_image` | every position behind the row's last image token, and every generated token |
| `generated` | generated tokens alone |
| `last_prompt` | the last prompt token of a turn alone |

| operator | at each chosen layer |
|---|---|
| `add` | h <- h + alpha * delta_l |
| `fill` | h <- h + alpha relu(h_t . r_l - h . r_l) r_l, r_l the refusal direction; once |

h_t is the state that the same request has as text, h'_c the steered state with a corrupted image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Any, Literal, get_args

from cmrm.errors import InputError

Schedule = Literal["telescoped", "per_layer", "sequential"]
Move = Literal["add", "fill"]
Positions = Literal["last", "all", "after_image", "generated", "last_prompt"]
Kind = Literal["shift", "sequential", "fill"]
"""What is done to a state: shift vectors or sequential ones are added, or fill."""


@dataclass(frozen=True)
class Steering:
    """How vectors are applied. Liu et al., arXiv 2410.09047, section 4; the tables are in the
    module."""

    alpha: float = 1.0
    """Strength, >= 0; 0 leaves the model as it is."""
    schedule: Schedule = "telescoped"
    """What is added at each layer."""
    positions: Positions = "last"
    """Which tokens are steered."""
    layers: tuple[int, ...] | None = None
    """0-based decoder layers that are steered, in ascending order. None: all; under `fill` the
    upper half; with a gate all above it; under `sequential` those of the estimate."""
    preserve_norm: bool = False
    """Rescale each steered state to the norm that it had before."""
    operator: Move = "add"
    """What is done to a state. `fill` acts once, at the last prompt token: the positions `last`
    mean `last_prompt` under it, and the schedule has no effect."""
    gate: bool = False
    """Steer those rows alone for which the artifact's harm gate opens."""

    def __post_init__(self) -> None:
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if not number or not isfinite(self.alpha) or self.alpha < 0:
            raise InputError(
                f"alpha is {self.alpha!r}; it is a finite number >= 0 (cmrm restores refusals, "
                "never removes them)"
            )
        if self.schedule not in get_args(Schedule):
            raise InputError(
                f"schedule is {self.schedule!r}; one of {', '.join(get_args(Schedule))}"
            )
        if self.positions not in get_args(Positions):
            raise InputError(
                f"positions is {self.positions!r}; one of {', '.join(get_args(Positions))}"
            )
        if self.layers is not None:
            object.__setattr__(self, "layers", layer_numbers(self.layers))
        for name in ("preserve_norm", "gate"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} is {getattr(self, name)!r}; it is true or false")
        if self.operator not in get_args(Move):
            raise InputError(f"operator is {self.operator!r}; one of {', '.join(get_args(Move))}")
        if self.operator == "fill" and self.positions == "last":
            object.__setattr__(self, "positions", "last_prompt")
        self._check_together()

    def _check_together(self) -> None:
        """Refuse combinations that mean nothing.

        Raises:
            InputError: two settings exclude each other.
        """
        if self.operator == "fill" and (self.positions != "last_prompt" or self.preserve_norm):
            raise InputError(
                "the operator fill raises one coordinate at the last prompt token; it goes with "
                "positions last_prompt and without preserve_norm"
            )
        if self.schedule == "sequential" and self.operator == "add":
            if self.positions not in ("last", "last_prompt"):
                raise InputError(
                    f"the schedule sequential is estimated at the last prompt token; positions is "
                    f"{self.positions!r}, choose last or last_prompt"
                )
            if self.preserve_norm:
                raise InputError("the schedule sequential goes without preserve_norm")
        if self.gate and self.positions in ("all", "after_image"):
            raise InputError(
                f"a gate decides at the last prompt token; positions is {self.positions!r}, choose "
                "last, last_prompt or generated"
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Steering:
        """A setting from a mapping of its fields; fields that are not there keep their defaults.

        Raises:
            InputError: a field is unknown or has a value that it cannot take.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(map(str, values)) - known)
        if unknown:
            raise InputError(
                f"steering has no setting {', '.join(unknown)}; known are "
                f"{', '.join(sorted(known))}"
            )
        return cls(**values)

    @property
    def kind(self) -> Kind:
        """What is done to a state; the other fields were chosen for it."""
        return kind_of(self.operator, self.schedule)

    def changed(self, changes: Mapping[str, Any]) -> Steering:
        """This setting with other fields, by name.

        Where they make another kind of it, the fields that they do not name have their defaults:
        layers and positions were chosen for the kind. A schedule that is named means that vectors
        are added. A gate that is turned on puts layers that are not named back to all above it.

        Raises:
            InputError: a field is unknown, has a value that it cannot take, or excludes another.
        """
        named = dict(changes)
        if "schedule" in named:
            named.setdefault("operator", "add")
        operator = named.get("operator", self.operator)
        if kind_of(operator, named.get("schedule", self.schedule)) != self.kind:
            return Steering.from_json(named)
        if named.get("gate") and not self.gate:
            named.setdefault("layers", None)
        return Steering.from_json({**asdict(self), **named})

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        values = asdict(self)
        values["layers"] = None if self.layers is None else list(self.layers)
        return values

    def chosen_layers(self, n_layers: int) -> tuple[int, ...]:
        """Layers to steer in a model of `n_layers`, ascending.

        Raises:
            InputError: a layer is out of range.
        """
        chosen = tuple(range(n_layers)) if self.layers is None else self.layers
        wrong = [layer for layer in chosen if layer >= n_layers]
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise InputError(
                f"layers {wrong[:5]}{more} are out of range: this model's decoder layers are "
                f"0..{n_layers - 1}"
            )
        return chosen


def kind_of(operator: str, schedule: str) -> Kind:
    """The kind of a setting with this operator and this schedule."""
    if operator == "fill":
        return "fill"
    return "sequential" if schedule == "sequential" else "shift"


def layer_numbers(layers: Sequence[int]) -> tuple[int, ...]:
    """Decoder layers of a setting, ascending.

    Raises:
        InputError: they are no list of whole numbers >= 0 with each layer once.
    """
    whole = not isinstance(layers, str) and all(
        isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in layers
    )
    if not whole or not layers or len(set(layers)) != len(layers):
        raise InputError(
            f"layers are {layers!r}; expected a list of 0-based decoder layers, each once, such as "
            "[0, 1, 2], "
            "or nothing for all layers"
        )
    return tuple(sorted(layers))


def layer_ranges(layers: Sequence[int]) -> str:
    """`0-8, 12`: ascending layers for messages and tables; `none` without any."""
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and layer == ranges[-1][-1] + 1:
            ranges[-1].append(layer)
        else:
            ranges.append([layer])
    shown = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in ranges]
    return ", ".join(shown) or "none"


PRESETS = {"calibrated": Steering(), "paper": Steering(schedule="per_layer", positions="all")}
"""`paper`: the paper's letter. `calibrated`: the default fields, telescoped, so that alpha 1.0
means the whole shift to first order; layers amplify what is added, and 1.0 may overshoot."""
