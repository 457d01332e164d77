"""Promote the exports of a run folder to its current version, unless they are worse than that
version; and roll back to an older version.

See `diffsynth_dagster.promoted` for the layout of versions on disk.
"""

import re
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from filelock import FileLock, Timeout

from diffsynth_dagster.errors import OutputError
from diffsynth_dagster.export.judged import Verdict, compare, numbers_of, with_best
from diffsynth_dagster.export.listing import Listing, changed_since, read_listing
from diffsynth_dagster.facts import digest_of
from diffsynth_dagster.files import (
    hidden_beside,
    hidden_folder,
    link_whole,
    refusals,
    remove,
    require_held,
    write_folder,
    write_text,
)
from diffsynth_dagster.own_names import CHECKPOINT
from diffsynth_dagster.promoted import (
    CURRENT,
    FOLDER,
    Promoted,
    current_promoted,
    promoted_versions,
    write_promoted,
)
from diffsynth_dagster.run.folder import owned
from diffsynth_dagster.run.record import PICTURES, RunRecord, read_record

Digest = Callable[[Path], str]
# Hexadecimal digits of a version's name; `own_names.VERSION` expects as many.
_DIGITS = 12
# How long to wait for another process that promotes or rolls back.
_WAIT_S = 60.0
# The names that `export.card` gives its files. Importing it here would load torch.
_CARD, _CURVE = "README.md", "loss.svg"
# A picture in the model card: its link leads out of exports/ into samples/.
_PICTURE = re.compile(rf"\]\(\.\./{PICTURES}/([^)]+)\)")


@dataclass(frozen=True)
class Outcome:
    """The result of promoting or rolling back.

    Attributes:
        what: "promoted": the new export is now the current version. "unchanged": it already was.
            "refused": it is worse than the current version, which stays. "kept": the current
            version stays for another reason. "rolled back": an older version is now current.
        why: the reason, for a message.
        current: the version that is current now.
        verdict: the comparison of the new export with the version that was current before; None if
            they were not compared.
        unfinished: whether the new export is of an unfinished training.
    """

    what: Literal["promoted", "unchanged", "refused", "kept", "rolled back"]
    why: str
    current: Promoted
    verdict: Verdict | None = None
    unfinished: bool = False


def promote(folder: Path, margin: float, keep: int, digest: Digest, force: bool = False) -> Outcome:
    """Make the exports of a run folder its current version, unless they are worse than the version
    that is current now. Then remove all but the newest versions.

    Args:
        margin: how much worse they may be, as a fraction of the current version's loss.
        keep: how many versions are kept. The current one is always kept.
        digest: file → BLAKE3 of its bytes.
        force: promote them even if they are worse, or were rolled back from.

    Raises:
        OutputError: there is no export, or it does not load, or it was changed; it is of an
            unfinished training and nothing was promoted before; the folder is in use, or cannot be
            written.
    """
    read_listing(folder)  # before locking: that would create the folder
    with owned(folder, "promoting"), _alone(folder):
        listing, current = read_listing(folder), current_promoted(folder)
        if listing.unfinished is not None:
            return _of_unfinished(folder, listing.unfinished, current)
        record = _require_sound(folder, listing, digest)
        new = _described(folder, listing, record)
        known = {version.version: version for version in promoted_versions(folder)}
        # Versions are named by content: an equal export that was promoted before is reused.
        before = known.get(new.version)
        if current is not None and current.version == new.version:
            current = _measured_anew(current, new)
            outcome = Outcome("unchanged", "it is the current version already", current)
        elif current is not None and (left := _rolled_back(new, known.values())) and not force:
            # A schedule would else promote again what a person has just rolled back.
            why = f"version {left.version} was rolled back from at {left.rolled_back}"
            return Outcome("kept", why, current)
        else:
            outcome = _judged(new, current, margin, force)
            new = outcome.current if outcome.what == "promoted" else new
        if outcome.what == "promoted":
            # The folder is complete before the link points to it.
            if before is None:
                _write(folder, new, listing)
            outcome = replace(outcome, current=_point(folder, _measured_anew(before or new, new)))
        _drop(folder, keep)
    return outcome


def roll_back(folder: Path, version: str) -> Outcome:
    """Make an older promoted version the current one. Does not wait for a training that is running.

    Args:
        version: the name of the version, or its beginning.

    Raises:
        OutputError: no version has that name, or several have; or the folder cannot be written.
    """
    known = promoted_versions(folder)
    matching = [item for item in known if version and item.version.startswith(version)]
    if len(matching) != 1:
        names = ", ".join(item.version for item in reversed(known)) or "none"
        problem = "several promoted versions begin" if matching else "no promoted version begins"
        raise OutputError(
            f"{problem} with '{version}'",
            where=str((folder / FOLDER).absolute()),
            do=f"give one of those that are there, the newest first: {names}",
        )
    with _alone(folder):
        (chosen,), current = matching, current_promoted(folder)
        missing = [path for path in _paths(chosen) if not path.is_file()]
        if missing:
            raise OutputError(
                f"files of the promoted version {chosen.version} are missing",
                where=", ".join(str(path.absolute()) for path in missing),
                do="give another version, or train again",
            )
        if current is not None and current.version == chosen.version:
            return Outcome("unchanged", "it is the current version already", current)
        if current is not None:
            # The mark keeps the next promotion from making this version current again.
            write_promoted(replace(current, rolled_back=_now()), current.folder)
        why = "" if current is None else f", in the place of {current.version}"
        return Outcome(
            "rolled back", f"version {chosen.version} was asked for{why}", _point(folder, chosen)
        )


def _rolled_back(new: Promoted, known: Iterable[Promoted]) -> Promoted | None:
    """The version of the same checkpoint that was rolled back from; None if there is none.

    Versions are compared by their checkpoint: other export formats make another version of it.
    """
    same = (item for item in known if (item.training, item.step) == (new.training, new.step))
    return next((item for item in same if item.rolled_back), None)


def _of_unfinished(folder: Path, unfinished: str, current: Promoted | None) -> Outcome:
    """Keep the current version, because the new export is of an unfinished training.

    Raises:
        OutputError: there is no current version to keep.
    """
    why = f"what is exported is of an unfinished training ({unfinished})"
    if current is None:
        raise OutputError(
            f"nothing can be promoted: {why}",
            where=str(folder.absolute()),
            do="let the training come to its end (in Dagster: materialize the checkpoints), and export it",
        )
    return Outcome("kept", why, current, unfinished=True)


def _judged(new: Promoted, current: Promoted | None, margin: float, force: bool) -> Outcome:
    """Decide whether a new version is promoted: compare it with the current one."""
    if current is None:
        return Outcome("promoted", "it is the first one", new)
    verdict = compare(new.numbers, current.numbers, margin)
    if verdict is None:
        # Promoted all the same: new data is the usual reason to train again.
        why = "it cannot be compared: it has no loss of the same samples as the one before"
        return Outcome("promoted", why, new)
    if not verdict.is_worse:
        new = replace(new, numbers=with_best(new.numbers, current.numbers))
        return Outcome("promoted", f"it is not worse: {verdict}", new, verdict)
    if force:
        return Outcome(
            "promoted", f"that was asked for, though it is worse: {verdict}", new, verdict
        )
    return Outcome("refused", f"it is worse: {verdict}", current, verdict)


def _require_sound(folder: Path, listing: Listing, digest: Digest) -> RunRecord:
    """Return the record of the training, after checking that its exports load and are unchanged.
    Raises `OutputError`."""
    record = read_record(folder)
    if record is None or record.identity != listing.training:
        raise OutputError(
            "what is exported is not of the training in the run folder",
            where=str(folder.absolute()),
            do="export the training again (in Dagster: materialize the exports)",
        )
    if not listing.loads:
        raise OutputError(
            "an exported file does not load in the tool that it is for",
            where=str((folder / "exports").absolute()),
            do="export the training again, which says what is wrong (in Dagster: materialize the exports)",
        )
    files = {folder / "exports" / name: value for name, value in listing.files.items()}
    files |= {folder / name: value for name, value in listing.checkpoints.items()}
    changed = [path for path, known in files.items() if not path.is_file() or digest(path) != known]
    if changed:
        raise changed_since(changed)
    return record


def _described(folder: Path, listing: Listing, record: RunRecord) -> Promoted:
    """The exports of a run folder as a version, with its name and its numbers. Writes nothing."""
    checkpoints = {_lasting_name(name): name for name in listing.checkpoints}
    # The digest contains no times and no numbers: equal files are the same version.
    content = [listing.files, {n: listing.checkpoints[name] for n, name in checkpoints.items()}]
    version = digest_of(content)[:_DIGITS]
    now = _now()
    return Promoted(
        version=version,
        folder=folder / FOLDER / version,
        training=listing.training,
        step=listing.step,
        checkpoints=checkpoints,
        files=list(listing.files),
        promoted=now,
        current_since=now,
        numbers=numbers_of(folder, record, listing.step),
    )


def _measured_anew(known: Promoted, new: Promoted) -> Promoted:
    """Update an existing version with the numbers of an equal export, which may have been measured
    on other samples. Raises `OutputError`."""
    changed = {
        name: number
        for name, number in new.numbers.items()
        # `best` comes from the history of versions: a change of it is no new measurement.
        if name not in known.numbers or replace(known.numbers[name], best=number.best) != number
    }
    if not changed:
        return known
    numbers = {**known.numbers, **changed}
    known = replace(known, numbers=numbers)
    write_promoted(known, known.folder)
    return known


def _lasting_name(name: str) -> str:
    """The name of a checkpoint's file within a version, the same in every version:
    `epoch-3.safetensors` → `checkpoint.safetensors`."""
    match = CHECKPOINT.fullmatch(name)
    assert match is not None, "a training names its checkpoints so"
    # What follows the number stays: it tells the files of several modules apart.
    return f"checkpoint{name[match.end('number') :]}"


def _write(folder: Path, version: Promoted, listing: Listing) -> None:
    """Write the folder of a version. Its files are hard links to the exported files, or copies if
    the file system has no hard links. Raises `OutputError`."""
    exports = folder / "exports"

    def fill(staged: Path) -> None:
        for name in listing.files:
            link_whole(exports / name, staged / name)
        for name, source in version.checkpoints.items():
            link_whole(folder / source, staged / name)
        _write_card(folder, staged)
        write_promoted(version, staged)

    sizes = [exports / name for name in listing.files]
    sizes += [folder / name for name in listing.checkpoints]
    if version.folder.exists():  # `promoted_versions` skips a folder without `promoted.json`
        _remove(version.folder)
    write_folder(version.folder, fill, sum(path.stat().st_size for path in sizes))


def _write_card(folder: Path, version: Path) -> None:
    """Put the model card, with the pictures that it shows, into the folder of a version."""
    card, curve = folder / "exports" / _CARD, folder / "exports" / _CURVE
    if curve.is_file():
        link_whole(curve, version / _CURVE)
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8", errors="replace")
    for name in map(unquote, _PICTURE.findall(text)):
        picture = folder / PICTURES / name
        if picture.is_file():
            link_whole(picture, version / PICTURES / name)
    write_text(version / _CARD, _PICTURE.sub(rf"]({PICTURES}/\1)", text))


def _point(folder: Path, version: Promoted) -> Promoted:
    """Make a version the current one by replacing the link atomically: a reader gets the old
    version or the new one, never a mixture.

    Raises:
        OutputError: the file system has no symbolic links, or the path of the link is taken.
    """
    version = replace(version, current_since=_now(), rolled_back=None)
    write_promoted(version, version.folder)
    link = folder / CURRENT
    require_held(link)
    if link.exists() and not link.is_symlink():
        raise OutputError(
            "what should be a link to the promoted version is something else: copying the run folder may "
            "have made files of it",
            where=str(link.absolute()),
            do="remove it, and run this again",
        )
    try:
        with hidden_folder(link) as hidden:
            staged = hidden / link.name
            # Relative, so that the run folder may be moved.
            staged.symlink_to(Path(FOLDER).name + "/" + version.version, target_is_directory=True)
            staged.replace(link)
    except OSError as error:
        raise OutputError(
            f"the link to the promoted version cannot be made: {error}",
            where=str(link.absolute()),
            do="give an output_path that can be written, on a file system with symbolic links",
        ) from error
    return version


def _drop(folder: Path, keep: int) -> None:
    """Remove all versions but the `keep` that were current last. Raises `OutputError`."""
    current = current_promoted(folder)
    kept = [] if current is None else [current.version]
    versions = promoted_versions(folder)
    kept += [item.version for item in versions[-keep:]]
    for item in versions:
        if item.version not in kept:
            _remove(item.folder)


def _remove(version: Path) -> None:
    """Remove the folder of a version. Raises `OutputError`."""
    require_held(version)
    with refusals("a promoted version cannot be removed", version):
        # Renamed first: if this process is killed, no half-removed version is left under its name.
        remove(version.rename(hidden_beside(version)))


def _paths(version: Promoted) -> list[Path]:
    return [version.folder / name for name in (*version.checkpoints, *version.files)]


@contextmanager
def _alone(folder: Path) -> Generator[None]:
    """Lock the promoted versions of a run folder.

    This is a lock of its own, because a training holds the lock of the run folder for hours, and
    rolling back must not wait for that.

    Raises:
        OutputError: another process still holds the lock after a minute; or the folder cannot be
            written.
    """
    place = folder / FOLDER
    with refusals("a version cannot be promoted", place):
        place.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place / ".lock", timeout=_WAIT_S)
        try:
            lock.acquire()
        except Timeout:
            raise OutputError(
                "another process promotes a version, or rolls back to one",
                where=str(place.absolute()),
                do="wait until that is done",
            ) from None
    try:
        yield
    finally:
        lock.release()


def _now() -> str:
    """The time in UTC in ISO format. As text, times sort in their order."""
    return datetime.now(UTC).isoformat(timespec="microseconds")
