"""What of a defence can be tuned, as data: each setting with its kind and its range.

A search knows nothing else of a defence, so that every one is tuned by the same command.
"""

from __future__ import annotations

from dataclasses import dataclass

from cmrm.errors import InputError


@dataclass(frozen=True)
class Real:
    """A number within `low..high`."""

    name: str
    """The setting, as the defence's class takes it."""
    low: float
    """Least value."""
    high: float
    """Largest value."""
    log: bool = False
    """Whether ratios count instead of differences; `low` is above 0 then."""

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise InputError(f"the range of {self.name} is {self.low}..{self.high}; it is empty")


@dataclass(frozen=True)
class Whole:
    """A whole number within `low..high`."""

    name: str
    """The setting, as the defence's class takes it."""
    low: int
    """Least value."""
    high: int
    """Largest value."""

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise InputError(f"the range of {self.name} is {self.low}..{self.high}; it is empty")


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    name: str
    """The setting, as the defence's class takes it."""
    values: tuple[str | bool | int | float, ...]
    """Those that it may have."""


@dataclass(frozen=True)
class LayerRange:
    """Neighbouring decoder layers, counted from 0; both ends are steered."""

    high: int
    """Highest layer that may be chosen."""
    low: int = 0
    """Lowest layer that may be chosen."""
    name: str = "layers"
    """The setting, as the defence's class takes it."""

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise InputError(
                f"no layer is left to choose for {self.name}: {self.low}..{self.high} is empty"
            )


Dimension = Real | Whole | Choice | LayerRange
Space = tuple[Dimension, ...]
"""Settings that can be tuned, each independent of the others."""
