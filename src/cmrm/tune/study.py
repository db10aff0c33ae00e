"""An Optuna study in one SQLite file, bound to what it compares, that any call continues.

A trial is written when it is finished: kill -9 at any moment loses the one that was running, and
it is the next call's first. Its replies are in the store, as far as they were generated.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from cmrm.errors import InputError
from cmrm.tune.choose import Objectives, Point

NAME = "tune"
"""Of the study in its file."""
ENDED = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
"""States of trials that are over, in words."""


@dataclass(frozen=True)
class Row:
    """One trial that is over."""

    number: int
    """Optuna's number of it."""
    state: str
    """`finished`, `pruned` on the partial set, or `failed`."""
    values: Objectives
    """On the whole dev set; empty where it is not finished."""
    attributes: Mapping[str, Any]
    """What was stored of it: `origin`, `settings`, `partial`, `rates`, `proxy`, `seconds`,
    `reason`."""

    @property
    def default(self) -> bool:
        """Whether it is the defence's default setting."""
        return bool(self.attributes.get("origin") == "default")

    @property
    def point(self) -> Point:
        """For `tune.choose`."""
        return Point(self.number, self.values, self.default)


class Study:
    """Trials of one defence on one model, with one dev set."""

    def __init__(self, file: Path, bound: Mapping[str, str], *, objectives: int, seed: int) -> None:
        """Open the study of `file`, or begin it.

        Args:
            file: SQLite file; its folder is made.
            bound: what the study is of, by its name in messages -> identity.
            objectives: number of figures that are to be small.
            seed: of the sampler.

        Raises:
            InputError: the file is no study, or one of something else; what differs is named.
        """
        self.file = file
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # By a creator: the path in an address would need its special characters quoted.
            storage = optuna.storages.RDBStorage(
                "sqlite://",
                engine_kwargs={
                    "creator": lambda: sqlite3.connect(file, timeout=60, check_same_thread=False)
                },
            )
            self._study = optuna.create_study(
                storage=storage,
                study_name=NAME,
                directions=["minimize"] * objectives,
                load_if_exists=True,
            )
        except (OSError, sqlite3.Error, SQLAlchemyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            raise InputError(f"{file} cannot be used as a study: {reason}") from None
        self._check(bound)
        self._study.sampler = optuna.samplers.TPESampler(seed=seed + len(self._study.trials))
        self._left = self._left_over()

    def _check(self, bound: Mapping[str, str]) -> None:
        stored = self._study.user_attrs.get("bound")
        if stored is None:
            self._study.set_user_attr("bound", dict(bound))
            return
        other = [name for name, value in bound.items() if stored.get(name) != value]
        if other:
            raise InputError(
                f"{self.file} is a study of another {' and another '.join(other)}; name another "
                "folder with --out"
            )

    def _left_over(self) -> list[int]:
        """Ids of the trials that a killed call left behind."""
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [trial._trial_id for trial in running]

    def get(self, name: str) -> Any:
        """A fact of the whole study; None where it was not stored."""
        return self._study.user_attrs.get(name)

    def put(self, name: str, value: Any) -> None:
        """Store a fact of the whole study, as JSON."""
        self._study.set_user_attr(name, value)

    def rows(self) -> list[Row]:
        """The trials that are over, by number.

        Those that repeat another one, or never got a point, failed without a reason; they are left
        out.
        """
        return [
            Row(trial.number, ENDED[trial.state], tuple(_values(trial)), dict(trial.user_attrs))
            for trial in self._study.get_trials(deepcopy=False, states=tuple(ENDED))
            if trial.state is not TrialState.FAIL or "reason" in trial.user_attrs
        ]

    def finished(self) -> list[Row]:
        """Those that were measured on the whole dev set."""
        return [row for row in self.rows() if row.state == "finished"]

    def add(self, values: Objectives, attributes: Mapping[str, Any]) -> None:
        """Store a measured trial that has no point in the space: the default setting."""
        self._study.add_trial(create_trial(values=list(values), user_attrs=dict(attributes)))

    def enqueue(self, points: Sequence[Mapping[str, Any]], origin: str) -> None:
        """Points that are tried next, in this order."""
        for point in points:
            self._study.enqueue_trial(dict(point), user_attrs={"origin": origin})

    def ask(self, distributions: Mapping[str, BaseDistribution]) -> optuna.Trial:
        """The next trial: one that a killed call left behind, a point of the queue, or one of the
        sampler."""
        while self._left:
            trial = optuna.Trial(self._study, self._left.pop(0))
            if set(trial.params) == set(distributions):
                return trial
            self._study.tell(trial, state=TrialState.FAIL)  # killed before it had all parameters
        return self._study.ask(dict(distributions))

    def tell(
        self,
        trial: optuna.Trial,
        state: TrialState,
        values: Objectives | None = None,
        **attributes: Any,
    ) -> None:
        """End a trial."""
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        self._study.tell(trial, None if values is None else list(values), state=state)


def _values(trial: FrozenTrial) -> Iterator[float]:
    return iter(trial.values if trial.state is TrialState.COMPLETE else ())
