"""Before each pass of vLLM's model runner: which of its tokens are steered, and to what.

A runner's `State` knows the program, the board, and what has to be remembered of requests between
passes: where a gate's decision is held, and the coordinates that `fill` raises states to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from cmrm.engines.vllm.board import Board, Row, steered_tokens
from cmrm.engines.vllm.program import Program
from cmrm.errors import ModelError

MOST_RECORDS = 100_000
"""Recorded coordinates that wait for their request; the oldest ones go first."""
MOST_OUTCOMES = 10_000
"""Outcomes that wait to be asked for; the oldest ones go first."""
REQUEST_KEY = "cmrm"
"""Of `SamplingParams.extra_args`: `{"record": name}`; `{"target": name}` of what was recorded, or
`{"target": [coordinates]}`; `{"uses": n}`, behind which a record is dropped; `{"name": name}` of a
request whose outcome will be asked for."""


class State:
    """What one model runner remembers."""

    def __init__(self, program: Program, board: Board) -> None:
        self.program, self.board = program, board
        self.slots: dict[str, int] = {}
        """Request -> where the gate's decision about it is held."""
        self.decided: set[str] = set()
        """Requests about which the gate has decided."""
        self.records: dict[str, torch.Tensor] = {}
        """Name -> what was recorded of a text: coordinates, or states where the program `reads`;
        they stay on the device."""
        self.targets: dict[str, torch.Tensor] = {}
        """Request -> the coordinates that it is raised to."""
        self.pending: list[tuple[str, int]] = []
        """(name, token) of the last pass whose coordinates are to be recorded."""
        self.counts = {"steps": 0, "tokens": 0, "masked": 0}
        """Passes, tokens, and tokens at steered positions of image requests."""
        self.outcomes: dict[str, dict[str, Any]] = {}
        """Name -> `{"steered": tokens at steered positions, "open": the gate's decision or None}`
        of the requests that have a name, or of all."""
        self.uses: dict[str, int] = {}
        """Name -> requests that have taken the record."""
        self.counted: dict[str, str] = {}
        """Request -> the name under which its outcome is kept."""
        self.remembers = False
        """Whether outcomes of all requests are kept, by vLLM's own names of them."""
        self.deciding: list[tuple[str, int]] = []
        """(name, slot) of the last pass's requests about which the gate decided."""
        self.eager = False
        """Whether every step is run by Python, neither compiled nor captured."""
        self.testing = False
        """Whether the pass that comes is one of the self-test."""

    def prepare(
        self,
        requests: Iterable[str],
        scheduled: Mapping[str, int],
        known: Mapping[str, Any],
        ended: Iterable[str] = (),
    ) -> None:
        """Fill the board for a pass.

        Args:
            requests: the batch, in its order.
            scheduled: tokens of each in this pass.
            known: vLLM's state of every request that it knows.
            ended: requests that ended before this pass; a new one may have the same name.

        Raises:
            ModelError: something is not known that decides whether tokens are steered.
        """
        self.keep_records()
        self._forget(known, set(ended))
        rows, targets, start = [], [], 0
        for request in requests:
            state = known.get(request)
            if state is None:
                raise ModelError(
                    f"cmrm: nothing is known of the request {request}; no answer is given"
                )
            row = self._row(request, state, scheduled[request])
            if (self.program.fills or self.program.reads) and row.decides:
                self._await_record(state, start + row.prompt - 1 - row.first)
            self._remember(request, state, row)
            rows.append(row)
            targets.append(self._target(request, state, row))
            start += row.count
        masked = self.board.fill_in(
            rows, self.program.positions, targets if self.program.fills else ()
        )
        if self.program.reads:
            self.board.places = torch.tensor(
                [token for _, token in self.pending],
                dtype=torch.long,
                device=self.board.mask.device,
            )
        texts_alone = all(row.image_end is None for row in rows)
        self.board.idle = self.eager and texts_alone and not self.pending
        self.counts["steps"] += 1
        self.counts["tokens"] += start
        self.counts["masked"] += masked

    def keep_records(self) -> None:
        """Keep what was asked for of the last pass."""
        for k, (name, token) in enumerate(self.pending):
            if len(self.records) >= MOST_RECORDS:
                oldest = next(iter(self.records))
                self.records.pop(oldest)
                self.uses.pop(oldest, None)
            if self.program.reads:
                states = [self.board.kept[layer][k] for layer in self.program.reads]
                self.records[name] = torch.stack(states)
            else:
                self.records[name] = self.board.seen[token].clone()
        self.pending = []
        for name, slot in self.deciding:
            if name in self.outcomes:  # stays on the device: the host does not wait for it
                self.outcomes[name]["open"] = self.board.held[slot].clone()
        self.deciding = []

    def _remember(self, request: str, state: Any, row: Row) -> None:
        """Count a request's steered tokens, where somebody may ask for them."""
        asks = asked(state)
        name = asks.get("name", request if self.remembers and "record" not in asks else None)
        if not isinstance(name, str):
            return
        if request not in self.counted:
            self.counted[request] = name
            if len(self.outcomes) >= MOST_OUTCOMES:
                self.outcomes.pop(next(iter(self.outcomes)))
            self.outcomes.setdefault(name, {"steered": 0, "open": None})
        outcome = self.outcomes.get(name)
        if outcome is None:  # nobody asked for it in time; a part of it is not told
            return
        outcome["steered"] += int(steered_tokens(row, self.program.positions).sum())
        if self.board.gated and row.decides and row.image_end is not None:
            self.deciding.append((name, row.slot))

    def taken_outcomes(self) -> dict[str, dict[str, Any]]:
        """`outcomes` so far, which are forgotten."""
        self.keep_records()
        taken, self.outcomes = self.outcomes, {}
        return {name: _plain(outcome) for name, outcome in taken.items()}

    def outcome_of(self, part: str) -> dict[str, Any] | None:
        """What happened to the requests whose name holds `part`, which is forgotten: the sum of
        steered tokens, and whether the gate opened for one; None where nothing is known."""
        self.keep_records()
        names = [name for name in self.outcomes if part in name]
        outcomes = [_plain(self.outcomes.pop(name)) for name in names]
        if not outcomes:
            return None
        decisions = [outcome["open"] for outcome in outcomes if outcome["open"] is not None]
        steered = sum(outcome["steered"] for outcome in outcomes)
        return {"steered": steered, "open": any(decisions) if decisions else None}

    def taken_records(self) -> dict[str, torch.Tensor]:
        """`records` so far, float32 on the CPU, which are forgotten."""
        self.keep_records()
        taken, self.records = self.records, {}
        return {name: record.cpu() for name, record in taken.items()}

    def _forget(self, known: Mapping[str, Any], ended: set[str]) -> None:
        """Drop what is held for requests that are gone, also where a new one has the same name."""

        def stays(request: str) -> bool:
            return request in known and request not in ended

        self.slots = {name: slot for name, slot in self.slots.items() if stays(name)}
        self.targets = {name: target for name, target in self.targets.items() if stays(name)}
        self.decided = {name for name in self.decided if stays(name)}
        self.counted = {name: kept for name, kept in self.counted.items() if stays(name)}

    def _row(self, request: str, state: Any, count: int) -> Row:
        """What is known of one request's tokens in this pass."""
        places = [feature.mm_position for feature in state.mm_features or ()]
        ends = [place.offset + place.length for place in places]
        row = Row(
            int(state.num_computed_tokens), int(count), int(state.num_prompt_tokens),
            max(ends, default=None), self._slot(request) if self.board.gated else 0,
        )  # fmt: skip
        if self.board.gated:
            if row.decides:
                self.decided.add(request)
            elif ends and row.first >= row.prompt and request not in self.decided:
                raise ModelError(f"cmrm: the gate has not decided about the request {request}")
        return row

    def _slot(self, request: str) -> int:
        """Where the gate's decision about a request is held."""
        if request not in self.slots:
            taken = set(self.slots.values())
            free = next((k for k in range(self.board.slots) if k not in taken), None)
            if free is None:
                raise ModelError("cmrm: too many requests wait with a decision of the gate")
            self.slots[request] = free
            self.board.held[free] = 0.0
        return self.slots[request]

    def _target(self, request: str, state: Any, row: Row) -> torch.Tensor | None:
        """Coordinates that fill raises the row to; None where it steers nothing in this pass."""
        if not self.program.fills or row.image_end is None or not row.decides:
            return None
        if request not in self.targets:
            target = asked(state).get("target")
            if isinstance(target, list) and len(target) == len(self.program.fills):
                device = self.board.mask.device
                self.targets[request] = torch.tensor(target, dtype=torch.float32, device=device)
            elif isinstance(target, str) and target in self.records:
                self.targets[request] = self._taken(target, asked(state).get("uses"))
            else:
                raise ModelError(
                    f"cmrm: fill has no coordinates of the text of the request {request}; no "
                    "answer is given"
                )
        return self.targets[request]

    def _taken(self, name: str, uses: Any) -> torch.Tensor:
        """A record, which is dropped where the last of its `uses` takes it."""
        record = self.records[name]
        if isinstance(uses, int):
            self.uses[name] = self.uses.get(name, 0) + 1
            if self.uses[name] >= uses:
                del self.records[name], self.uses[name]
        return record

    def _await_record(self, state: Any, token: int) -> None:
        """Keep the coordinates of a token of the coming pass, where its request asks for it."""
        name = asked(state).get("record")
        if isinstance(name, str):
            self.pending.append((name, token))


def _plain(outcome: Mapping[str, Any]) -> dict[str, Any]:
    """An outcome with its decision on the host."""
    decision = outcome["open"]
    return {**outcome, "open": None if decision is None else bool(decision > 0)}


def asked(state: Any) -> Mapping[str, Any]:
    """What the engine says of a request in `SamplingParams.extra_args`."""
    extra = getattr(state.sampling_params, "extra_args", None) or {}
    values = extra.get(REQUEST_KEY)
    return values if isinstance(values, Mapping) else {}


def state_of(runner: Any) -> State:
    """The state of a runner.

    Raises:
        ModelError: it is not armed.
    """
    state = getattr(runner, "cmrm_state", None)
    if not isinstance(state, State):
        raise ModelError("cmrm: this model runner is not armed; no answer is given")
    return state


def before_step(
    original: Callable[..., Any], runner: Any, scheduled: Any, *args: Any, **more: Any
) -> Any:
    """Around `_preprocess`: the batch is in its order then, and nothing has run yet."""
    state_of(runner).prepare(
        runner.input_batch.req_ids, scheduled.num_scheduled_tokens, runner.requests,
        scheduled.finished_req_ids,
    )  # fmt: skip
    return original(runner, scheduled, *args, **more)


def before_dummy(original: Callable[..., Any], runner: Any, *args: Any, **more: Any) -> Any:
    """Around `_dummy_run`: passes that answer nobody steer nothing."""
    state = getattr(runner, "cmrm_state", None)
    if isinstance(state, State) and not state.testing:
        state.keep_records()
        state.board.clear()
    return original(runner, *args, **more)
