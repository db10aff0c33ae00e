"""Intervening in the residual stream: settings, edits as data, positions, hooks. Knows tensors, no
files."""
