"""Where samples come from: files and hub data by a column map, and named sets with their official layout."""

from cmrm.prompts.loading import Loaded, Skipped, load_samples
from cmrm.prompts.catalogue import NAMED, NamedSet

__all__ = ["NAMED", "Loaded", "NamedSet", "Skipped", "load_samples"]
