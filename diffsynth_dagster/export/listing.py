"""`exports/exported.json`: which files were exported, of which checkpoint, and whether they load.

It is removed before an export begins and written at its end, so that what it says is true of a whole one.
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
    """What was exported.

    Attributes:
        training: identity of the training: see `RunRecord`.
        step: of the checkpoint.
        unfinished: how far the training had come; None where it reached its end.
        loads: whether the tool of each file takes it.
        checkpoints: file of the checkpoint, as a path from the run folder → digest of its bytes.
        files: exported file, as a path from `exports/` → digest of its bytes.
    """

    training: str
    step: int
    unfinished: str | None
    loads: bool
    checkpoints: Mapping[str, str]
    files: Mapping[str, str]


def forget_listing(folder: Path) -> None:
    """Let a run folder say nothing of its exports, which are about to be made anew. Raises `OutputError`."""
    path = folder / FILE_NAME
    require_held(path)
    with refusals("what an older export left cannot be removed", path):
        path.unlink(missing_ok=True)


def write_listing(folder: Path, listing: Listing) -> None:
    """Write what was exported into a run folder. Raises `OutputError`."""
    write_text(folder / FILE_NAME, json.dumps(asdict(listing), indent=2) + "\n")


def list_files(exports: Path, known: Mapping[Path, str]) -> dict[str, str]:
    """The exported files, as paths from `exports/` → digests.

    Args:
        known: one file of each export → its digest, or that of all its files together. What lies beside
            it in its folder, such as its settings and shards, belongs to it.
    """
    folders = dict.fromkeys(path.parent for path in known)
    paths = [p for folder in folders for p in folder.iterdir() if _belongs(p)]
    alone = {path: digest for path, digest in known.items() if path.suffix == ".safetensors"}
    return {
        path.relative_to(exports).as_posix(): alone.get(path) or digest_file(path)
        for path in sorted(paths)
    }


def _belongs(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".")


def read_listing(folder: Path) -> Listing:
    """What a run folder says of its exports.

    Raises:
        OutputError: nothing was exported there, or the file is damaged.
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
    """The error for exports that are not as they were written."""
    return OutputError(
        "exported files are missing or were changed since they were written",
        where=", ".join(str(path.absolute()) for path in paths),
        do="export the training again (in Dagster: materialize the exports)",
    )
