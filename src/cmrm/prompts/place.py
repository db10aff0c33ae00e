"""Where a named set lies on this machine, and its files and rows."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cmrm.errors import InputError
from cmrm.prompts.tables import Row, is_saved_dataset, read_table


@dataclass(frozen=True)
class Place:
    """Where a set is read from, and how."""

    folder: Path | None
    """The folder of `--path`; None for hub ids and sets that come with a package."""
    hub: str | None
    """Hub id, where the set is read from the hub."""
    variant: str
    """Chosen variant."""
    seed: int
    """Seed of sets that are composed by a recipe."""
    needs: str
    """Files that the folder must hold, for messages."""

    def find(self, *names: str) -> Path:
        """The first of `names` (relative paths) that exists in the folder or one folder below.

        Raises:
            InputError: none does; the message names the files that the set needs.
        """
        assert self.folder is not None
        for name in names:
            for candidate in (self.folder / name, *sorted(self.folder.glob(f"*/{name}"))):
                if candidate.exists():
                    return candidate
        raise InputError(f"{' or '.join(names)} is not in {self.folder}; needed: {self.needs}")

    def images(self, *names: str) -> Path:
        """The image folder: the first of `names` that exists, else the set's own folder."""
        assert self.folder is not None
        for name in names:
            if (self.folder / name).is_dir():
                return self.folder / name
        return self.folder

    def rows(self, split: str, pattern: str) -> list[Row]:
        """Rows of a split of a hub set: from the hub, or from the folder.

        The folder holds a set saved by `datasets`, or Parquet files whose names match `pattern`.

        Raises:
            InputError: the folder holds neither, or the rows cannot be read.
        """
        if self.hub is not None:
            return read_table(self.hub, split=split)
        assert self.folder is not None
        if is_saved_dataset(self.folder):
            several = (self.folder / "dataset_dict.json").is_file()
            return read_table(self.folder, split=split if several else None)
        files = sorted(self.folder.rglob(pattern))
        if not files:
            raise InputError(f"no file {pattern} is in {self.folder}; needed: {self.needs}")
        return [row for file in files for row in read_table(file)]


def place_of(name: str, variant: str | None = None) -> Path | None:
    """The folder of a named set below the one that the environment variable `CMRM_DATA` names.

    The folder with the name and the variant comes first, then the one with the name, then the first
    whose name begins with it and a `-`; `_` stands for `-` too. None where there is none.

    Raises:
        InputError: `CMRM_DATA` names no folder.
    """
    root = os.environ.get("CMRM_DATA")
    if not root:
        return None
    if not Path(root).expanduser().is_dir():
        raise InputError(f"CMRM_DATA names {root}, which is no folder")
    wanted = name.replace("_", "-")
    whole = f"{wanted}-{variant or ''}".lower().replace("_", "-")
    folders = sorted(f for f in Path(root).expanduser().iterdir() if f.is_dir())
    names = [(folder, folder.name.lower().replace("_", "-")) for folder in folders]
    exact = [folder for known in (whole, wanted) for folder, called in names if called == known]
    others = [folder for folder, called in names if called.startswith(f"{wanted}-")]
    return next(iter(exact + others), None)
