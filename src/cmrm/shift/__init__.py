"""Estimating the shift that an image causes: capture, prefixes, estimators, the artifact, and
`steer`."""
