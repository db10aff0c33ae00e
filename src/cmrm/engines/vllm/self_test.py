"""A self-test on passes that answer nobody: steered tokens move, and others do not."""

from __future__ import annotations

import logging
from typing import Any

import torch

from cmrm.engines.vllm.stepping import state_of
from cmrm.errors import ModelError

SELF_TEST_TOKENS = 8
"""Of the passes that show at the start that steering works."""
SELF_TEST_TARGET = 1e3
"""Coordinate that `fill` is asked for there."""
_log = logging.getLogger("cmrm.vllm")


def self_test(runner: Any) -> None:
    """Show on passes that answer nobody that steered tokens move, and that others do not.

    Raises:
        ModelError: they do not, or they do.
    """
    state = state_of(runner)
    board, program = state.board, state.program
    moving = any(bool(tensor.any()) for tensor in program.adds.values()) or bool(program.fills)
    n = min(SELF_TEST_TOKENS, runner.max_num_tokens)

    def passed(steered: slice) -> torch.Tensor:
        board.clear()
        board.mask[steered] = 1.0
        board.held.fill_(1.0)
        board.slot[:n] = 0
        board.target.fill_(SELF_TEST_TARGET)
        state.testing = True
        try:
            states, _ = runner._dummy_run(n, force_attention=True)
        finally:
            state.testing = False
            board.clear()
            board.held.zero_()
        return torch.as_tensor(states[:n]).float().clone()

    plain, all_of_them = passed(slice(0, 0)), passed(slice(0, n))
    again = passed(slice(0, 0))
    if moving and bool((plain == all_of_them).all(dim=-1).any()):
        raise ModelError("cmrm: the self-test failed, a steered token did not move; not started")
    if not torch.equal(plain, again):
        raise ModelError("cmrm: the self-test failed, an unsteered pass moved; not started")
    _log.warning("cmrm: self-test passed on %d tokens", n)
