"""Where samples come from: files and hub data by a column map, and named sets with their official layout."""

from cmrm.sets.loading import Loaded, Skipped, load_samples
from cmrm.sets.named import NAMED, NamedSet

__all__ = ["NAMED", "Loaded", "NamedSet", "Skipped", "load_samples"]
