"""The promoted versions of the exports of a run folder: those that others use.

    exports/current                        a link to the version that is used now
    exports/promoted/<version>/            the exported files, as they lay in exports/
        checkpoint.safetensors             the checkpoint that they were made of
        promoted.json                      what the version is, and the numbers that it was judged by

A version stays where it is when another training begins in the run folder. The link is relative, so that
the run folder may be moved. `export.promote` writes all this.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from diffsynth_dagster.errors import OutputError
from diffsynth_dagster.files import write_text
from diffsynth_dagster.own_names import VERSION

FOLDER, CURRENT, FILE_NAME = "exports/promoted", "exports/current", "promoted.json"


@dataclass(frozen=True)
class Measured:
    """A number that exports are judged by.

    Attributes:
        value: smaller is better.
        of: digest of the samples that it was measured on and of how: two numbers can be compared where
            these are equal.
        best: the smallest of those that led to it, each measured in the same way: what a new one is compared
            with, so that many that are a little worse do not add up. Left out: the value.
    """

    value: float
    of: str
    best: float | None = None

    @property
    def bar(self) -> float:
        """What a new one is compared with."""
        return self.value if self.best is None else self.best


@dataclass(frozen=True)
class Promoted:
    """A promoted version.

    Attributes:
        version: short digest of the content of its files.
        folder: where it lies.
        training: identity of the training that made it: see `RunRecord`.
        step: of its checkpoint.
        checkpoints: names of its checkpoint's files there → what they were called in the run folder.
        files: the other files, as paths from its folder.
        numbers: by name, those that it was judged by.
        promoted: when it was made, in UTC.
        current_since: when it became the current version last, in UTC.
        rolled_back: when another version was made current in its place by hand; None where it was not.
    """

    version: str
    folder: Path
    training: str
    step: int
    checkpoints: Mapping[str, str]
    files: list[str]
    promoted: str
    current_since: str
    rolled_back: str | None = None
    numbers: Mapping[str, Measured] = field(default_factory=dict[str, Measured])

    @property
    def checkpoint_files(self) -> list[Path]:
        """The files of its checkpoint."""
        return [self.folder / name for name in self.checkpoints]


def current_promoted(folder: Path) -> Promoted | None:
    """The promoted version of a run folder that is used now; None where there is none.

    Raises:
        OutputError: what it says of itself is damaged.
    """
    known = _read(folder / CURRENT)
    return None if known is None else replace(known, folder=folder / FOLDER / known.version)


def promoted_versions(folder: Path) -> list[Promoted]:
    """The promoted versions that a run folder has, the one that became current last at the end.

    Raises:
        OutputError: what one says of itself is damaged.
    """
    places = (path for path in (folder / FOLDER).glob("*") if VERSION.fullmatch(path.name))
    known = filter(None, map(_read, places))
    return sorted(known, key=lambda version: (version.current_since, version.version))


def write_promoted(version: Promoted, folder: Path) -> None:
    """Write what a version is into its folder, or where that is being made. Raises `OutputError`."""
    said = {name: value for name, value in asdict(version).items() if name != "folder"}
    write_text(folder / FILE_NAME, json.dumps(said, indent=2) + "\n")


def _read(folder: Path) -> Promoted | None:
    """What a version says of itself; None where there is none."""
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        numbers = {name: Measured(**each) for name, each in said.pop("numbers").items()}
        return Promoted(**said, numbers=numbers, folder=folder)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise OutputError(
            f"the promoted version cannot be read: {error}",
            where=str(path.absolute()),
            do="remove its folder, and promote again",
        ) from error
