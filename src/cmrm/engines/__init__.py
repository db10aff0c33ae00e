"""Engines: where a model answers. Each consumes the same interventions as data."""
