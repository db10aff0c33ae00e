"""Errors that a user can correct. The command line prints them as one line and exits with 2."""

from __future__ import annotations


class CmrmError(Exception):
    """Base of all errors whose message names the cause and the remedy."""


class InputError(CmrmError):
    """A sample, image, option or file that was handed in cannot be used."""


class ModelError(CmrmError):
    """A model or processor does not have the structure that the method needs."""


class ArtifactError(CmrmError):
    """A shift artifact is broken, or does not belong to this model."""


class SteeringError(CmrmError):
    """Steering could not be applied, or did not reach the layers that it should."""


class MissingExtraError(CmrmError):
    """An optional dependency is not installed; the message names the extra."""
