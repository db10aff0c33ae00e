"""Sweeps: one thing is varied, everything else stays, and each point is measured on a dev set."""

import cmrm.tune  # noqa: F401  names the extra where a library is missing
