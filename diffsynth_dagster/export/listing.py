"""`exports/exported.json`: which files were exported, from which checkpoint, and whether they load.

It is removed before an export begins and written at its end, so it never describes half an export.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from diffsynth_dagster.errors import OutputError
from diffsynth_dagster.facts import digest_file
from diffsynth_dagster.files import refusals, require_held, write_text
from diffsynth_dagster.own_names import LISTING

FILE_NAME = LISTING


@dataclass(frozen=True)
class Listing:
    """The content of `exported.json`.

    Attributes:
        training: the identity of the training: see `RunRecord`.
        step: the step after which the checkpoint was written.
        unfinished: how far an unfinished training had come; None for a finished one.
        loads: whether every file loads in its tool.
        checkpoints: file of the checkpoint, as a path from the run folder → BLAKE3 of its bytes.
        files: exported file, as a path from `exports/` → BLAKE3 of its bytes.
    """

    training: str
    step: int
    unfinished: str | None
    loads: bool
    checkpoints: Mapping[str, str]
    files: Mapping[str, str]


def forget_listing(folder: Path) -> None:
    """Remove the listing, because new exports are about to be written. Raises `OutputError`."""
    path = folder / FILE_NAME
    require_held(path)
    with refusals("what an older export left cannot be removed", path):
        path.unlink(missing_ok=True)


def write_listing(folder: Path, listing: Listing) -> None:
    """Write the listing into a run folder. Raises `OutputError`."""
    write_text(folder / FILE_NAME, json.dumps(asdict(listing), indent=2) + "\n")


def list_files(exports: Path, known: Mapping[Path, str]) -> dict[str, str]:
    """All exported files: path from `exports/` → digest.

    Args:
        known: one file of each export → its digest; an index → the digest of all its files
            together. The other files in the same folder, such as settings and shards, belong to the
            export.
    """
    folders = dict.fromkeys(path.parent for path in known)
    paths = [path for folder in folders for path in folder.iterdir() if _belongs(path)]
    # A known digest is used again, unless the file is an index: that one covers its shards too.
    single = {path: digest for path, digest in known.items() if path.suffix == ".safetensors"}
    return {
        path.relative_to(exports).as_posix(): single.get(path) or digest_file(path)
        for path in sorted(paths)
    }


def _belongs(path: Path) -> bool:
    """Whether a file is part of an export: hidden files are leftovers of a killed writer."""
    return path.is_file() and not path.name.startswith(".")


def read_listing(folder: Path) -> Listing:
    """Read the listing of a run folder.

    Raises:
        OutputError: nothing was exported, or the listing is damaged.
    """
    path = folder / FILE_NAME
    try:
        return Listing(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise OutputError(
            "the run folder holds no export",
            where=str(folder.absolute()),
            do="export the training first (in Dagster: materialize the exports)",
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(
            f"what was exported cannot be read: {error}",
            where=str(path.absolute()),
            do="export the training again (in Dagster: materialize the exports)",
        ) from error


def changed_since(paths: Sequence[Path]) -> OutputError:
    """The error for exported files that are missing or were changed."""
    return OutputError(
        "exported files are missing or were changed since they were written",
        where=", ".join(str(path.absolute()) for path in paths),
        do="export the training again (in Dagster: materialize the exports)",
    )
