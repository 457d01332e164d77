"""Write files atomically: a file is either complete or not there."""

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
"""Age at which another machine's hidden file counts as left over."""
_NOTHING_LEFT = 64 * 1024
"""With fewer bytes free, a write error is taken to mean that the disk is full."""
# The umask can only be read by setting it.
_UMASK = os.umask(0o077)
os.umask(_UMASK)


def hidden_beside(path: Path) -> Path:
    """A new name for a hidden file beside `path`. This process removes the file; if it is killed,
    `remove_leftovers` does."""
    # The host and process in the name show later whether the writer is still alive.
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


@contextmanager
def hidden_folder(path: Path) -> Generator[Path]:
    """A temporary folder, named by `hidden_beside`, that is removed after the block."""
    folder = hidden_beside(path)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_HIDDEN = re.compile(r"\..+\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}")


def is_leftover(name: str) -> bool:
    """Whether a name is one of `hidden_beside`, from any process."""
    return _HIDDEN.fullmatch(name) is not None


def _host() -> str:
    """A short name of this machine, without characters that a file name cannot have."""
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def remove_leftovers(folder: Path) -> None:
    """Remove hidden files and folders that killed processes left in a folder.

    Those of this machine are removed if their process has ended; others after a day.
    """
    for path in folder.glob(".*"):
        match = _HIDDEN.fullmatch(path.name)
        if match is not None:
            with contextlib.suppress(OSError):  # removed by another process, or not ours
                written = path.stat().st_mtime
                ours = match[1] == _host()
                if time.time() - written > _OLD_S or (ours and _ended(int(match[2]), written)):
                    remove(path)


def _ended(process: int, written: float) -> bool:
    """Whether the process with this id that wrote something at a time has ended. Ids are given again:
    in a container that is started anew, to the same program."""
    try:
        return psutil.Process(process).create_time() > written + 1  # times are rounded
    except psutil.NoSuchProcess:
        return True


_HELD: dict[Path, Callable[[], None]] = {}
"""Folder that this process holds → a check that raises if it no longer does."""


@contextmanager
def held(folder: Path, check: Callable[[], None]) -> Generator[None]:
    """During the block, call `check` before anything in a folder is written or replaced."""
    folder = folder.absolute()
    _HELD[folder] = check
    try:
        yield
    finally:
        del _HELD[folder]


def require_held(path: Path) -> None:
    """Check that this process still holds the folder that a path is in.

    Another process may have taken the folder, or it may have been moved and made again. All writers
    here call this; code that removes or renames files in such a folder calls it too.

    Raises:
        OutputError: see `run_folder.owned`.
    """
    absolute = path.absolute()
    for folder, check in [*_HELD.items()]:  # a copy: other threads may add and remove folders
        if absolute.is_relative_to(folder):
            check()


def write_whole(path: Path, write: Callable[[Path], object], size: int | None = None) -> Path:
    """Write a file atomically: into a hidden folder beside `path`, flushed, then renamed to `path`.

    Args:
        write: writes the file to the path that it is given.
        size: bytes that the file needs, for the message if the disk is full.

    Raises:
        OutputError: the folder cannot be written, the disk is full, or another process took the
            folder (see `require_held`). The earlier file is kept.
    """
    with _staged(path, size) as staged:
        write(staged)
        _flush(staged)  # before the rename: after a power cut the name must not be of an empty file
        with contextlib.suppress(PermissionError):  # FAT and many shares have no permissions
            staged.chmod(0o666 & ~_UMASK)  # some libraries write files that only the owner can read
    return path


def write_folder(path: Path, write: Callable[[Path], object], size: int) -> Path:
    """Write a new folder atomically: a hidden one beside `path`, then renamed to `path`.

    Args:
        path: must not exist yet.
        write: fills the folder that it is given, with files that are each flushed.
        size: bytes that the folder needs.

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
    """A path in a hidden folder beside `path`; renamed to `path` unless the block raises.

    The hidden folder also collects the temporary files that some libraries write beside their
    output; they are removed with it.
    """
    require_held(path)
    folder = hidden_beside(path.absolute())  # polars expands a "~" at the start of a relative path
    staged = folder / path.name
    try:
        folder.mkdir(parents=True)
        yield staged
        require_held(path)  # writing may have taken minutes
        staged.replace(path)
    except Exception as error:
        require_held(path)  # a better message than that a hidden file does not exist
        for_user = _as_user_error(error, path, staged, size)
        if for_user is None:
            raise
        raise for_user from error
    finally:
        # What cannot be removed now is left to `remove_leftovers`.
        shutil.rmtree(folder, ignore_errors=True)


def _as_user_error(
    error: Exception, path: Path, staged: Path, size: int | None
) -> OutputError | None:
    """The user's error for a failed write; None if the file system is not the reason."""
    if isinstance(error, UserError) and not isinstance(error, OutputError):
        return None
    # Some libraries do not say in their error that the disk is full.
    if says_full(error) or _free(path.parent) < _NOTHING_LEFT:
        written = staged.stat().st_size if staged.exists() else 0
        return _no_space(path.parent, size or written + 1, str(path))
    return not_written(error, str(path))


def _flush(path: Path) -> None:
    """Write a file's content, or a folder's list of names, from the system's cache to the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists. Raises `OSError`."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _no_space(folder: Path, size: int, where: str) -> OutputError:
    """The error for a full disk.

    Args:
        size: bytes that are needed at least.
    """
    free = _free(folder)
    return OutputError(
        f"no space left in {folder}: at least {size:,} bytes are needed, and {free:,} are free",
        where=where,
        do="free some space and run it again: what was written before is whole, and is kept",
    )


def require_space(folder: Path, size: int, parameter: str) -> None:
    """Check that the disk has enough free space.

    Args:
        size: bytes that will be written into the folder at least.
        parameter: the parameter that names the folder.

    Raises:
        OutputError: fewer bytes are free.
    """
    if _free(folder) < size:
        raise _no_space(folder, size, f"{parameter} = {folder}")


def short_of_space(folder: Path, size: int, what: str) -> str | None:
    """A warning if something will need more space than is free, else None.

    Args:
        size: bytes that it will need, about.
        what: the thing that needs them, as the warning begins.
    """
    free = _free(folder)
    if size <= free:
        return None
    return f"{what} will need about {size:,} bytes in {folder}, and {free:,} are free"


def _free(folder: Path) -> int:
    """Free bytes on the disk of a folder, which may not exist yet."""
    absolute = folder.absolute()
    existing = next(path for path in (absolute, *absolute.parents) if path.exists())
    return shutil.disk_usage(existing).free


@contextmanager
def refusals(what: str, where: Path) -> Generator[None]:
    """Raise an `OSError` of the block, which moves or removes files, as an `OutputError`.

    Args:
        what: what failed, as the message begins.

    Raises:
        OutputError: the file system refused.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{what}: {error}", where=str(where), do="check the folder's permissions"
        ) from error


def link_whole(path: Path, other: Path) -> Path:
    """Make a hard link `other` to the file `path`, or a copy if the file system has no links.

    An existing `other` is replaced. The writers here replace files and never change them in place,
    so writing `path` again leaves `other` as it is.

    Raises:
        OutputError: see `write_whole`.
    """

    def link(staged: Path) -> None:
        try:
            os.link(path, staged)
        except OSError:  # FAT and some network file systems have no hard links
            shutil.copyfile(path, staged)

    return write_whole(other, link)


def write_text(path: Path, text: str) -> Path:
    """Write a text file atomically, in UTF-8. Raises `OutputError`."""

    def write(staged: Path) -> None:
        staged.write_text(text, encoding="utf-8")

    return write_whole(path, write, len(text.encode()))


def write_tensors(
    path: Path, tensors: "Mapping[str, torch.Tensor]", metadata: Mapping[str, str]
) -> Path:
    """Write a safetensors file atomically. Equal tensors and metadata give equal bytes.

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
    """Sort the text entries in the header of a safetensors file: the library's order is random.

    The header's length does not change, so the tensors stay where they are.
    """
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        # As safetensors writes it: any other form might be longer than the header.
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "safetensors writes compact JSON"
        file.seek(8)
        file.write(text.ljust(length))  # the format allows spaces at the end of the header


def require_writable(folder: Path, parameter: str) -> None:
    """Create a folder if needed, and check that files can be written there.

    Args:
        parameter: the parameter that names the folder.

    Raises:
        OutputError: it cannot be created or written.
    """
    # Permission bits do not show it: the folder may be on a read-only or full disk.
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
