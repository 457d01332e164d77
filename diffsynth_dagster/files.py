"""Writing files so that they are either whole or not there."""

import contextlib
import json
import os
import re
import shutil
import socket
import struct
import time
import uuid
import zlib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from diffsynth_dagster.disk import not_written, says_full
from diffsynth_dagster.errors import OutputError, UserError

if TYPE_CHECKING:
    import torch

_OLD_S = 24 * 3600.0
_NOTHING_LEFT = 64 * 1024
"""Bytes: with fewer of them free, it was the disk."""
_UMASK = os.umask(0o077)
os.umask(_UMASK)


def hidden_beside(path: Path) -> Path:
    """The name of a hidden file beside `path` that this process writes, and removes. If it is killed,
    `remove_leftovers` does."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


@contextmanager
def hidden_folder(path: Path) -> Generator[Path]:
    """A folder for a while, named by `hidden_beside`."""
    folder = hidden_beside(path)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_HIDDEN = re.compile(r"\..+\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}")


def is_leftover(name: str) -> bool:
    """Whether a name is one of `hidden_beside`, of whatever process."""
    return _HIDDEN.fullmatch(name) is not None


def _host() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def remove_leftovers(folder: Path) -> None:
    """Remove the hidden files and folders that killed writers left in a folder: of processes of this
    machine that are gone, and of any machine after a day."""
    for path in folder.glob(".*"):
        named = _HIDDEN.fullmatch(path.name)
        if named is not None:
            with contextlib.suppress(OSError):  # gone meanwhile, or not ours
                old = time.time() - path.stat().st_mtime > _OLD_S
                if old or (named[1] == _host() and not psutil.pid_exists(int(named[2]))):
                    remove(path)


_HELD: dict[Path, Callable[[], None]] = {}
"""Folder that this process holds → raises where it does not any more."""


@contextmanager
def held(folder: Path, check: Callable[[], None]) -> Generator[None]:
    """While the block runs, let `check` be called before anything in a folder is written or replaced."""
    folder = folder.absolute()
    _HELD[folder] = check
    try:
        yield
    finally:
        del _HELD[folder]


def require_held(path: Path) -> None:
    """Refuse to go on where this process holds a folder that a path lies in, and the folder is another
    one by now. Every writer here calls it; whoever removes or renames files there calls it too.

    Raises:
        OutputError: see `run_folder.owned`.
    """
    place = path.absolute()
    for folder, check in [*_HELD.items()]:
        if place.is_relative_to(folder):
            check()


def write_whole(path: Path, write: Callable[[Path], object], size: int | None = None) -> Path:
    """Let `write` make a file in a hidden folder beside `path`, flush it, and rename it to `path`.

    Args:
        size: bytes that it will need, for the message when there is no space for them.

    Raises:
        OutputError: the folder cannot be written, the disk is full, or another process took the folder
            (see `require_held`). What was there stays.
    """
    with _staged(path, size) as staged:
        write(staged)
        _flush(staged)
        with contextlib.suppress(PermissionError):  # FAT and many shares keep no permissions
            staged.chmod(0o666 & ~_UMASK)
    return path


def write_folder(path: Path, write: Callable[[Path], object], size: int) -> Path:
    """Let `write` fill a hidden folder beside `path`, with files that are each written whole, and
    rename it to `path`, which is not there yet.

    Raises:
        OutputError: see `write_whole`.
    """
    with _staged(path, size) as staged:
        staged.mkdir()
        write(staged)
        _flush(staged)
    _flush(path.parent)
    return path


@contextmanager
def _staged(path: Path, size: int | None) -> Generator[Path]:
    """A name in a hidden folder beside `path` that is renamed to it at the end, or removed.

    In a folder of its own, since libraries write hidden files beside what they are asked for: these are
    removed with it too.
    """
    require_held(path)
    folder = hidden_beside(path.absolute())  # polars takes "~" at the beginning for the home folder
    staged = folder / path.name
    try:
        folder.mkdir(parents=True)
        yield staged
        require_held(path)  # writing may have taken minutes
        staged.replace(path)
    except Exception as error:
        require_held(path)  # or it would be said that a hidden file is not there
        refused = _refused(error, path, staged, size)
        if refused is None:
            raise
        raise refused from error
    finally:
        shutil.rmtree(
            folder, ignore_errors=True
        )  # what cannot be removed is left to the next owner


def _refused(error: Exception, path: Path, staged: Path, size: int | None) -> OutputError | None:
    """The error for the user, of one that came while a file was written; None where it is no refusal
    of the file system."""
    if isinstance(error, UserError) and not isinstance(error, OutputError):
        return None
    # Some libraries do not even say that the disk is full.
    if says_full(error) or _free(path.parent) < _NOTHING_LEFT:
        written = staged.stat().st_size if staged.exists() else 0
        return _no_space(path.parent, size or written + 1, str(path))
    return not_written(error, str(path))


def _flush(path: Path) -> None:
    """Let a file, or the names in a folder, reach the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there. Raises `OSError`."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _no_space(folder: Path, size: int, where: str) -> OutputError:
    """The error for what does not fit on the disk.

    Args:
        size: bytes that it needs, as far as that is known.
    """
    free = _free(folder)
    return OutputError(
        f"no space left in {folder}: at least {size:,} bytes are needed, and {free:,} are free",
        where=where,
        do="free some space and run it again: what was written before is whole, and is kept",
    )


def require_space(folder: Path, size: int, parameter: str) -> None:
    """Refuse to begin what does not fit on the disk.

    Args:
        size: bytes that will be written into the folder at the least.
        parameter: names the folder.

    Raises:
        OutputError: fewer are free.
    """
    if _free(folder) < size:
        raise _no_space(folder, size, f"{parameter} = {folder}")


def short_of_space(folder: Path, size: int, what: str) -> str | None:
    """A warning where something will need more space than is free; None where it fits.

    Args:
        size: bytes, about.
        what: needs them.
    """
    free = _free(folder)
    if size <= free:
        return None
    return f"{what} will need about {size:,} bytes in {folder}, and {free:,} are free"


def _free(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    there = next(
        place for place in (folder.absolute(), *folder.absolute().parents) if place.exists()
    )
    return shutil.disk_usage(there).free


@contextmanager
def refusals(what: str, where: Path) -> Generator[None]:
    """A block in which the file system may refuse to move or remove something.

    Args:
        what: what could then not be done, as the message begins.

    Raises:
        OutputError: it refused.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{what}: {error}", where=str(where), do="check the folder's permissions"
        ) from error


def link_whole(path: Path, other: Path) -> Path:
    """Let a file have another name too, in the place of what is there; a copy where the file system has no
    links. What replaces the file later, as all writers here do, leaves the other one.

    Raises:
        OutputError: see `write_whole`.
    """

    def link(staged: Path) -> None:
        try:
            os.link(path, staged)
        except OSError:
            shutil.copyfile(path, staged)

    return write_whole(other, link)


def write_text(path: Path, text: str) -> Path:
    """Write a text file whole. Raises `OutputError`."""

    def write(staged: Path) -> None:
        staged.write_text(text, encoding="utf-8")

    return write_whole(path, write, len(text.encode()))


def write_tensors(
    path: Path, tensors: "Mapping[str, torch.Tensor]", metadata: Mapping[str, str]
) -> Path:
    """Write a safetensors file whole. Equal tensors and metadata give equal bytes.

    Raises:
        OutputError: see `write_whole`.
    """
    from safetensors.torch import save_file

    ordered = {name: tensors[name] for name in sorted(tensors)}

    def write(staged: Path) -> None:
        save_file(ordered, staged, metadata=dict(metadata))
        _sort_metadata(staged)

    size = sum(tensor.numel() * tensor.element_size() for tensor in ordered.values())
    return write_whole(path, write, size)


def _sort_metadata(path: Path) -> None:
    """Put the header's text entries in order: safetensors writes them in a random one.

    The header keeps its length, so the tensors stay where they are.
    """
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "safetensors writes compact JSON"
        file.seek(8)
        file.write(text.ljust(length))


def require_writable(folder: Path, parameter: str) -> None:
    """Make a folder and try it.

    Raises:
        OutputError: it cannot be made or written.
    """
    probe = hidden_beside(folder / "probe")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"the folder cannot be written: {error.strerror or error}",
            where=f"{parameter} = {folder}",
            do="give a folder that can be written",
        ) from error
