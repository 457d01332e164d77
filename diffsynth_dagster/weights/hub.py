"""Find model files in local folders and on ModelScope.

Environment variables: `DIFFSYNTH_MODEL_BASE_PATH` is the folder of downloads (default `./models`);
`DIFFSYNTH_SKIP_DOWNLOAD=True` turns downloading off; the modelscope package reads
`MODELSCOPE_ENDPOINT`.
"""

import glob
import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from diffsynth_dagster.config.entries import SHARD, ModelEntry
from diffsynth_dagster.errors import WeightsError
from diffsynth_dagster.weights.download import download

_TRUE = {"1", "true", "yes", "on"}
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_BESIDE = ("config.json", "*.index.json")
"""Small files that are downloaded with the weights in the same folder."""


@dataclass(frozen=True)
class ModelHub:
    """Finds the files of an entry of the model list, and downloads missing ones.

    Attributes:
        base_path: folder of downloads; a repository is at `<base_path>/<owner>/<name>`.
        skip_download: whether the hub is not contacted.
    """

    base_path: Path
    skip_download: bool

    @classmethod
    def from_environment(cls) -> "ModelHub":
        """The hub with the settings of the environment variables."""
        base = Path(os.environ.get("DIFFSYNTH_MODEL_BASE_PATH") or "./models")
        skip = os.environ.get("DIFFSYNTH_SKIP_DOWNLOAD", "").strip().lower() in _TRUE
        return cls(base, skip)

    def files(self, entry: ModelEntry) -> list[Path]:
        """The weight files of an entry, sorted.

        Raises:
            WeightsError: no file matches, or a shard is missing.
            DownloadError: the hub did not answer, or does not have the repository.
        """
        if entry.repository is None:
            found = [file for text in entry.paths for file in _local_files(text, entry.parameter)]
        else:
            found = self._downloaded(entry)
        _require_shards(entry, found)
        return found

    def _downloaded(self, entry: ModelEntry) -> list[Path]:
        """The weight files of an entry that names a repository. Raises: see `files`."""
        assert entry.repository is not None
        self._download(entry, tuple(f"*{suffix}" for suffix in _WEIGHTS))
        folder = self.base_path / entry.repository
        if not entry.pattern or entry.pattern.endswith("/"):
            found = _weights_in(folder / entry.pattern)
        else:
            # `root_dir`: the folder itself may have characters of patterns in its name.
            found = sorted(folder / name for name in glob.glob(entry.pattern, root_dir=folder))
            found = [path for path in found if path.is_file()]
        if not found:
            raise WeightsError(
                f"no file matches '{entry.text}'",
                where=f"{entry.parameter}; looked in {folder.absolute()}",
                do="check the pattern"
                + (", or unset DIFFSYNTH_SKIP_DOWNLOAD" if self.skip_download else ""),
            )
        return found

    def folder(self, entry: ModelEntry) -> Path:
        """The folder that an entry names (for a tokenizer).

        Raises:
            WeightsError: it does not exist or is empty.
            DownloadError: see `files`.
        """
        path = Path(entry.paths[0]) if entry.paths else Path()
        if entry.repository is not None:
            self._download(entry, ("*",))
            path = self.base_path / entry.repository / entry.pattern
        # os.path: a name that is too long does not exist; `Path.is_dir` raises an OSError.
        if not os.path.isdir(path) or not any(path.iterdir()):
            raise WeightsError(
                "the folder does not exist or is empty",
                where=f"{entry.parameter} = {path.absolute()}",
                do="name the folder that holds the tokenizer's files",
            )
        return path

    def _download(self, entry: ModelEntry, patterns: Iterable[str]) -> None:
        """Download an entry's files, with the configs and index beside them.

        Args:
            patterns: the files to download where the entry names a folder.
        """
        if self.skip_download:
            return
        assert entry.repository is not None
        schedule = "scheduler/scheduler_config.json"  # beside a denoiser's folder
        if not entry.pattern or entry.pattern.endswith("/"):
            folder, named = PurePosixPath(entry.pattern), [f"{entry.pattern}{n}" for n in patterns]
        else:
            folder, named = PurePosixPath(entry.pattern).parent, [entry.pattern]
        wanted = [*named, *(str(folder / name) for name in _BESIDE), schedule]
        download(
            entry.repository,
            wanted,
            self.base_path / entry.repository,
            f"{entry.parameter} = {entry.text}",
        )


class NotDownloaded(WeightsError):
    """A file of a repository has not been downloaded yet."""


class Downloads(ModelHub):
    """A hub that finds earlier downloads, and downloads nothing."""

    def __init__(self) -> None:
        super().__init__(ModelHub.from_environment().base_path, skip_download=True)

    def files(self, entry: ModelEntry) -> list[Path]:
        """See `ModelHub`. Raises `NotDownloaded` if a file would have to be downloaded."""
        with _not_downloaded(entry):
            return super().files(entry)

    def folder(self, entry: ModelEntry) -> Path:
        """See `ModelHub`. Raises `NotDownloaded` if a file would have to be downloaded."""
        with _not_downloaded(entry):
            return super().folder(entry)


@contextmanager
def _not_downloaded(entry: ModelEntry) -> Generator[None]:
    """Raise a `WeightsError` about a repository as `NotDownloaded`: a run would download it."""
    try:
        yield
    except WeightsError as error:
        if entry.repository is None:
            raise
        raise NotDownloaded(error.what, where=error.where, do=error.do) from error


def require_listed(entries: Iterable[ModelEntry]) -> None:
    """Check that no local file or folder is missing while others exist.

    Raises:
        WeightsError: some exist, and one does not.
    """
    listed, missing = _listed(entries)
    # If none exists, the recipe is written for another machine; checking it here is fine.
    if missing and len(missing) < len(listed):
        raise _no_file(*missing[0])


def require_there(entries: Iterable[ModelEntry]) -> None:
    """Check that all local files and folders exist. Raises `WeightsError`."""
    _, missing = _listed(entries)
    if missing:
        raise _no_file(*missing[0])


def _listed(entries: Iterable[ModelEntry]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(path, parameter) of every local path of the entries, and of those that do not exist."""
    listed = [(text, entry.parameter) for entry in entries for text in entry.paths]
    missing = [local for local in listed if not os.path.exists(local[0]) and not _matching(*local)]
    return listed, missing


def _matching(text: str, parameter: str) -> list[Path]:
    """The files that match an entry of `model_paths` as a pattern, sorted; none for other
    parameters, which take no patterns."""
    if parameter != "model_paths":
        return []
    # Brackets are common in folder names, so only `*` and `?` are special.
    return sorted(Path(path) for path in glob.glob(text.replace("[", "[[]")))


def _no_file(text: str, parameter: str) -> WeightsError:
    """The error for a path or pattern that matches no file."""
    return WeightsError(
        "the model file does not exist",
        where=f"{parameter} = {Path(text).absolute()}",
        do="correct the path, or download the model",
    )


def _require_shards(entry: ModelEntry, files: Sequence[Path]) -> None:
    """Check that files named like `-00001-of-00002` are all there. Raises `WeightsError`."""
    found: dict[str, set[int]] = {}
    for match in filter(None, (SHARD.search(path.name) for path in files)):
        found.setdefault(match[2], set()).add(int(match[1]))
    for total, numbers in found.items():
        missing = sorted(set(range(1, int(total) + 1)) - numbers)
        if missing:
            raise WeightsError(
                f"shard {missing[0]} of {int(total)} is missing",
                where=f"{entry.parameter} = {entry.text}; looked in {files[0].parent}",
                do="name all shards of the model, or download the others",
            )


def _weights_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*") if p.suffix in _WEIGHTS and p.is_file())


def _local_files(text: str, parameter: str) -> list[Path]:
    path = Path(text)
    if os.path.isfile(path):
        return [path]
    found = _weights_in(path) if os.path.isdir(path) else _matching(text, parameter)
    if not found:
        raise _no_file(text, parameter)
    return found
