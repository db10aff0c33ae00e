"""What is asked: samples of files, hub data and named sets, their splits, and their conditions."""

from cmrm.prompts.catalogue import NAMED, NamedSet
from cmrm.prompts.loading import Loaded, Skipped, load_samples, refuse_unratable
from cmrm.prompts.named_sets import load_named

__all__ = [
    "NAMED",
    "Loaded",
    "NamedSet",
    "Skipped",
    "load_named",
    "load_samples",
    "refuse_unratable",
]
