"""What the file system refuses is one message, and what a killed writer leaves is removed."""

import io
import multiprocessing
import resource
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pytest
import torch
from PIL import Image

from diffsynth_dagster.disk import disk_error
from diffsynth_dagster.errors import OutputError
from diffsynth_dagster.files import write_tensors, write_text, write_whole
from diffsynth_dagster.run.folder import owned
from diffsynth_dagster.seal import write_sealed

MOST = 100_000
"""Bytes of a file, as the limit of these tests has it."""
FRAME = pl.DataFrame({"a": torch.rand(100_000).numpy()})
WRITERS: dict[str, Callable[[Path], object]] = {
    "safetensors": lambda path: write_tensors(path, {"a": torch.zeros(MOST)}, {"format": "pt"}),
    "parquet": lambda path: write_sealed(
        path, lambda file, notes: FRAME.write_parquet(file, metadata=notes), {}
    ),
    "streamed parquet": lambda path: write_sealed(
        path, lambda file, notes: FRAME.lazy().sink_parquet(file, metadata=notes), {}
    ),
    "csv": lambda path: write_whole(path, FRAME.write_csv),
    "text": lambda path: write_text(path, "a" * 2 * MOST),
    "picture": lambda path: write_whole(
        path, lambda file: Image.effect_noise((600, 600), 90).save(file, format="PNG")
    ),
}


@contextmanager
def small_files() -> Generator[None]:
    """No file of this process may be larger than `MOST`: as on FAT32, with other numbers."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MOST, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def immutable(path: Path) -> Generator[None]:
    """A file or folder that nobody may change, whatever its permissions."""
    if (
        shutil.which("chattr") is None
        or subprocess.run(["chattr", "+i", str(path)], capture_output=True).returncode
    ):
        pytest.skip("no file can be made immutable here")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", str(path)], check=True)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_that_is_too_large_is_one_message(kind: str, tmp_path: Path) -> None:
    """Each library has an error of its own for it; what was there stays, and nothing else does."""
    path = write_text(tmp_path / "file", "before")
    with small_files(), pytest.raises(OutputError) as raised:
        WRITERS[kind](path)
    assert "larger than its file system (FAT32: 4 GiB) or `ulimit -f` allows" in raised.value.what
    assert raised.value.where == str(path)
    assert "another file system" in (raised.value.do or "")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_refuses_is_one_message(tmp_path: Path) -> None:
    with immutable(tmp_path), pytest.raises(OutputError) as raised:
        write_text(tmp_path / "file", "a text")
    assert "permission denied" in raised.value.what
    assert "lsattr" in (raised.value.do or "")


def test_a_file_whose_permissions_cannot_be_set_is_written(tmp_path: Path) -> None:
    """As on FAT and many network shares."""
    other = tmp_path / "other"
    other.write_text("of someone else")
    with immutable(other):
        written = write_whole(tmp_path / "file", lambda staged: staged.symlink_to(other))
        assert written.read_text() == "of someone else"


def test_what_is_not_the_file_systems_is_no_disk_error(tmp_path: Path) -> None:
    def mistaken(path: Path) -> None:
        raise ValueError("(os error 27)")

    with pytest.raises(ValueError, match="os error"):
        write_whole(tmp_path / "file", mistaken)
    assert disk_error(ValueError("(os error 27)")) is None
    assert disk_error(PermissionError(1, "a socket")) is None
    database = sqlite3.connect(tmp_path / "facts.sqlite")
    database.execute("CREATE TABLE known (facts TEXT)")
    database.execute("INSERT INTO known VALUES (?)", ("a" * 2 * MOST,))
    with small_files(), pytest.raises(sqlite3.OperationalError) as raised:
        database.commit()
    said = disk_error(raised.value)
    assert said is not None
    assert "the disk, or the connection to it, fails: disk I/O error" in said.what
    with pytest.raises(io.UnsupportedOperation) as no_disk:
        io.StringIO().fileno()
    assert disk_error(no_disk.value) is None


def test_what_a_killed_writer_leaves_is_removed(tmp_path: Path) -> None:
    """safetensors writes into a hidden file of its own, which stays when it is killed."""
    folder = tmp_path / "exports" / "diffusers" / "transformer"
    tensors = {"a": torch.zeros(1 << 26)}
    writing = (folder / "a.safetensors", tensors, {"format": "pt"})
    writer = multiprocessing.get_context("fork").Process(target=write_tensors, args=writing)
    writer.start()
    until = time.monotonic() + 60
    while not (half := [p for p in tmp_path.rglob(".tmp*") if p.stat().st_size]):
        assert time.monotonic() < until
    writer.kill()
    writer.join()
    assert half[0].exists()
    with owned(tmp_path, "a test"):
        assert not any(folder.iterdir())
