"""Promote the exports of a run folder: keep them as a version that others use, unless they are worse than
the one that is used now; and go back to a version of before.

See `diffsynth_dagster.promoted` for where versions lie.
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
_DIGITS = 12
_WAIT_S = 60.0
_CARD, _CURVE = "README.md", "loss.svg"
_PICTURE = re.compile(rf"\]\(\.\./{PICTURES}/([^)]+)\)")


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        what: "promoted": the new export is the current version now. "unchanged": it was that before.
            "refused": it is worse than the current version, which stays. "kept": the current version
            stays for another reason. "rolled back": a version of before is the current one now.
        why: in words.
        current: the version that is used now.
        verdict: how the new export compares with the version that was the current one; None where they
            were not compared.
        unfinished: whether the new export is of an unfinished training.
    """

    what: Literal["promoted", "unchanged", "refused", "kept", "rolled back"]
    why: str
    current: Promoted
    verdict: Verdict | None = None
    unfinished: bool = False


def promote(folder: Path, margin: float, keep: int, digest: Digest, force: bool = False) -> Outcome:
    """Make the exports of a run folder its current version, unless they are worse than the one that is;
    then remove all but the newest versions.

    Args:
        margin: how much worse they may be: a fraction of the loss.
        keep: versions that are kept. The current one always is.
        digest: file → BLAKE3 of its bytes.
        force: whether they become the current version even if they are worse, or were rolled back from.

    Raises:
        OutputError: there is no export, or it does not load, or was changed; it is of an unfinished
            training and nothing was promoted before; someone else holds the folder; or it cannot be
            written.
    """
    read_listing(folder)  # before anything is made in the folder
    with owned(folder, "promoting"), _alone(folder):
        listing, current = read_listing(folder), current_promoted(folder)
        if listing.unfinished is not None:
            return _of_unfinished(folder, listing.unfinished, current)
        record = _require_sound(folder, listing, digest)
        new = _described(folder, listing, record)
        known = {version.version: version for version in promoted_versions(folder)}
        before = known.get(new.version)
        if current is not None and current.version == new.version:
            current = _measured_anew(current, new)
            outcome = Outcome("unchanged", "it is the current version already", current)
        elif current is not None and (left := _rolled_back(new, known.values())) and not force:
            why = f"version {left.version} was rolled back from at {left.rolled_back}"
            return Outcome("kept", why, current)
        else:
            outcome = _judged(new, current, margin, force)
            new = outcome.current if outcome.what == "promoted" else new
        if outcome.what == "promoted":
            if before is None:
                _write(folder, new, listing)
            outcome = replace(outcome, current=_point(folder, _measured_anew(before or new, new)))
        _drop(folder, keep)
    return outcome


def roll_back(folder: Path, version: str) -> Outcome:
    """Make a version that is kept the current one. Needs no training, and waits for none.

    Args:
        version: its name, or the beginning of its name.

    Raises:
        OutputError: there is none of that name, or several; or the folder cannot be written.
    """
    known = promoted_versions(folder)
    found = [each for each in known if version and each.version.startswith(version)]
    if len(found) != 1:
        there = ", ".join(each.version for each in reversed(known)) or "none"
        several = "several promoted versions begin" if found else "no promoted version begins"
        raise OutputError(
            f"{several} with '{version}'",
            where=str((folder / FOLDER).absolute()),
            do=f"give one of those that are there, the newest first: {there}",
        )
    with _alone(folder):
        (chosen,), current = found, current_promoted(folder)
        gone = [path for path in _paths(chosen) if not path.is_file()]
        if gone:
            raise OutputError(
                f"files of the promoted version {chosen.version} are missing",
                where=", ".join(str(path.absolute()) for path in gone),
                do="give another version, or train again",
            )
        if current is not None and current.version == chosen.version:
            return Outcome("unchanged", "it is the current version already", current)
        if current is not None:
            write_promoted(replace(current, rolled_back=_now()), current.folder)
        why = "" if current is None else f", in the place of {current.version}"
        return Outcome(
            "rolled back", f"version {chosen.version} was asked for{why}", _point(folder, chosen)
        )


def _rolled_back(new: Promoted, known: Iterable[Promoted]) -> Promoted | None:
    """The version of the same checkpoint, perhaps in other files, that was rolled back from, if there is one."""
    same = (each for each in known if (each.training, each.step) == (new.training, new.step))
    return next((each for each in same if each.rolled_back), None)


def _of_unfinished(folder: Path, unfinished: str, current: Promoted | None) -> Outcome:
    """Refuse what is exported of an unfinished training. Raises `OutputError`: there is nothing else."""
    why = f"what is exported is of an unfinished training ({unfinished})"
    if current is None:
        raise OutputError(
            f"nothing can be promoted: {why}",
            where=str(folder.absolute()),
            do="let the training come to its end (in Dagster: materialize the checkpoints), and export it",
        )
    return Outcome("kept", why, current, unfinished=True)


def _judged(new: Promoted, current: Promoted | None, margin: float, force: bool) -> Outcome:
    """What becomes of a new version."""
    if current is None:
        return Outcome("promoted", "it is the first one", new)
    verdict = compare(new.numbers, current.numbers, margin)
    if verdict is None:
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
    """The record of a training whose exports are as they were written, and load. Raises `OutputError`."""
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
    """The version that the exports of a run folder would be."""
    checkpoints = {_lasting_name(name): name for name in listing.checkpoints}
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
    """A version that is there, with the numbers of an export that is equal to it. Raises `OutputError`."""
    others = {
        name: number
        for name, number in new.numbers.items()
        if name not in known.numbers or replace(known.numbers[name], best=number.best) != number
    }
    if not others:
        return known
    numbers = {**known.numbers, **others}
    known = replace(known, numbers=numbers)
    write_promoted(known, known.folder)
    return known


def _lasting_name(name: str) -> str:
    """What a file of a checkpoint is called in every version: `epoch-3.safetensors` is
    `checkpoint.safetensors`."""
    found = CHECKPOINT.fullmatch(name)
    assert found is not None, "a training names its checkpoints so"
    return f"checkpoint{name[found.end('number') :]}"


def _write(folder: Path, version: Promoted, listing: Listing) -> None:
    """Make the folder of a version, whole, under second names of the files where the file system has
    them. Raises `OutputError`."""
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
    if version.folder.exists():  # its `promoted.json` is gone
        _remove(version.folder)
    write_folder(version.folder, fill, sum(path.stat().st_size for path in sizes))


def _write_card(folder: Path, version: Path) -> None:
    """Let the model card of the exports, and the pictures that it shows, lie in a version too."""
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
    """Make a version the current one: what was read before is so still, or is the new one whole.

    Raises:
        OutputError: the file system has no symbolic links, or something else is in the place of the link.
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
    """Remove all versions but those that were the current one last. Raises `OutputError`."""
    current = current_promoted(folder)
    kept = [] if current is None else [current.version]
    versions = promoted_versions(folder)
    kept += [each.version for each in versions[-keep:]]
    for each in versions:
        if each.version not in kept:
            _remove(each.folder)


def _remove(version: Path) -> None:
    """Remove the folder of a version: it is there whole, or not. Raises `OutputError`."""
    require_held(version)
    with refusals("a promoted version cannot be removed", version):
        remove(version.rename(hidden_beside(version)))


def _paths(version: Promoted) -> list[Path]:
    return [version.folder / name for name in (*version.checkpoints, *version.files)]


@contextmanager
def _alone(folder: Path) -> Generator[None]:
    """Let no other process change which version is the current one. A training holds the run folder for
    hours, and nobody has to wait for it to roll back.

    Raises:
        OutputError: another process promotes or rolls back, and does not come to an end; or the folder
            cannot be written.
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
    """The time in UTC, as text in the order of times."""
    return datetime.now(UTC).isoformat(timespec="microseconds")
