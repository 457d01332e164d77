"""The promoted versions of a run folder's exports. Programs that use the model load the current
version.

    exports/current                        a link to the current version
    exports/promoted/<version>/            the exported files, laid out as in exports/
        checkpoint.safetensors             the checkpoint that was exported
        promoted.json                      what the version is, and the losses that it was judged by

A version stays in its place when another training begins in the run folder. The link is relative,
so that the run folder may be moved. `export.promote` writes these files.
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
    """A loss that exports are judged by.

    Attributes:
        value: the loss; smaller is better.
        of: digest of the samples and parameters it was measured with. Only numbers with equal
            digests can be compared.
        best: the smallest value among this version and the versions that it replaced. A new export
            is compared with it, so that many small losses of quality do not add up. None: `value`.
    """

    value: float
    of: str
    best: float | None = None

    @property
    def bar(self) -> float:
        """The value that a new export is compared with."""
        return self.value if self.best is None else self.best


@dataclass(frozen=True)
class Promoted:
    """A promoted version.

    Attributes:
        version: its name: a short digest of the content of its files.
        folder: the folder of the version.
        training: the identity of the training: see `RunRecord`.
        step: the step after which the checkpoint was written.
        checkpoints: file of the checkpoint in the version's folder → its name in the run folder.
        files: the exported files, as paths from the version's folder.
        promoted: when the version was first promoted, in UTC.
        current_since: when it last became the current version, in UTC.
        rolled_back: when a person rolled back from it, in UTC; None if nobody did.
        numbers: name → the loss it was judged by.
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
        """The files of the checkpoint."""
        return [self.folder / name for name in self.checkpoints]


def current_promoted(folder: Path) -> Promoted | None:
    """The current version of a run folder; None if nothing was promoted.

    Raises:
        OutputError: its `promoted.json` is damaged.
    """
    known = _read(folder / CURRENT)
    # The folder itself, not the link: the link may point to another version later.
    return None if known is None else replace(known, folder=folder / FOLDER / known.version)


def promoted_versions(folder: Path) -> list[Promoted]:
    """The promoted versions of a run folder, in the order in which they last became current.

    Raises:
        OutputError: a `promoted.json` is damaged.
    """
    folders = (path for path in (folder / FOLDER).glob("*") if VERSION.fullmatch(path.name))
    known = filter(None, map(_read, folders))
    # The name only breaks ties, so that the order is the same every time.
    return sorted(known, key=lambda version: (version.current_since, version.version))


def write_promoted(version: Promoted, folder: Path) -> None:
    """Write `promoted.json` into the folder of a version, which may still be a staging folder.
    Raises `OutputError`."""
    # Without the folder: its absolute path would be wrong after the run folder was moved.
    facts = {name: value for name, value in asdict(version).items() if name != "folder"}
    write_text(folder / FILE_NAME, json.dumps(facts, indent=2) + "\n")


def _read(folder: Path) -> Promoted | None:
    """Read the `promoted.json` in a folder; None if there is none. Raises `OutputError`."""
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        numbers = {name: Measured(**number) for name, number in facts.pop("numbers").items()}
        return Promoted(**facts, numbers=numbers, folder=folder)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise OutputError(
            f"the promoted version cannot be read: {error}",
            where=str(path.absolute()),
            do="remove its folder, and promote again",
        ) from error
