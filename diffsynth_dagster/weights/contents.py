"""Check that model files do not change between digesting and loading them.

A file is digested first and loaded later, sometimes hours later. The digest is in the keys of the
encoded samples and in the record of the training, so the loaded bytes must be the digested ones. If
a file's state (size, times) has changed, the file is digested again; another digest is an error.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from diffsynth_dagster.errors import WeightsError
from diffsynth_dagster.facts import FactCache, FileState, digest_file


class Contents:
    """The digests of the model files that this process uses.

    Args:
        again: digest each file once in this process, even if the fact cache has its digest.
    """

    def __init__(self, again: bool = False) -> None:
        self._again = again
        self._states: dict[Path, FileState] = {}
        self._digests: dict[Path, str] = {}
        self._files: dict[str, tuple[Path, ...]] = {}

    def note(self, paths: Iterable[Path]) -> None:
        """Remember the state of files. Call it before a header or config is read: what is read from
        the file then also belongs to the digested bytes."""
        self._states |= {path: _state(path) for path in paths}

    def digests(self, name: str, paths: tuple[Path, ...], fact_cache: FactCache) -> list[str]:
        """The digest of each file of a component or tokenizer.

        Args:
            name: the component or tokenizer.

        Raises:
            WeightsError: a file changed since it was noted or digested.
        """
        self._require_files(name, paths)
        self._files[name] = paths
        return [self._digest(path, fact_cache) for path in paths]

    def require_unchanged(self, name: str, files: Callable[[], tuple[Path, ...]]) -> None:
        """Check that a component's files have not changed since they were digested (if they were).

        A check before loading is not enough: call it again after the last read.

        Raises:
            WeightsError: a file changed, or there are other files now.
        """
        if name in self._files:
            self._require_files(name, files())
            for path in self._files[name]:
                self._require_same(path)

    def _require_files(self, name: str, paths: tuple[Path, ...]) -> None:
        """Raise `WeightsError` if files of a component were added or removed since the digest."""
        different = set(paths) ^ set(self._files.get(name, paths))
        if different:
            raise _changed(min(different))

    def _digest(self, path: Path, fact_cache: FactCache) -> str:
        if path in self._digests:
            self._require_same(path)
            return self._digests[path]
        state = self._states.setdefault(path, _state(path))
        digest = fact_cache.digest(path, self._again)
        # Digesting many gigabytes takes minutes in which the file may be replaced.
        if _state(path) != state:
            raise _changed(path)
        self._digests[path] = digest
        return digest

    def _require_same(self, path: Path) -> None:
        known, state = self._states[path], _state(path)
        if state == known:
            return
        is_same = state.size == known.size and digest_file(path) == self._digests[path]
        if not is_same or _state(path) != state:
            raise _changed(path)
        self._states[path] = state  # same bytes: the file was touched or moved to another disk


def _state(path: Path) -> FileState:
    """The state of a file. Raises `WeightsError` if the file is gone."""
    try:
        return FileState.of(path)
    except OSError as error:
        raise _changed(path) from error


def _changed(path: Path) -> WeightsError:
    return WeightsError(
        "the model file was replaced or changed while it was in use",
        where=str(path),
        do="start again, and let nothing write to a model file meanwhile: put another model into a "
        "file of its own, and name that one",
    )
