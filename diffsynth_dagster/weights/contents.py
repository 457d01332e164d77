"""The content of model files, which must stay what it is while they are used.

A file is digested, and loaded later: seconds later, or hours later for a sample. Samples are stored
under that digest, and the record of a training names it. So what is loaded must be what was
digested: a file whose state differs from the one it was digested in is digested again, and refused
if its content is another one.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from diffsynth_dagster.errors import WeightsError
from diffsynth_dagster.facts import FactCache, FileState, digest_file


class Contents:
    """The digests of model files that this process goes by.

    Args:
        again: digest each file anew, once, whatever the cache of facts knows of it.
    """

    def __init__(self, again: bool = False) -> None:
        self._again = again
        self._states: dict[Path, FileState] = {}
        self._digests: dict[Path, str] = {}
        self._files: dict[str, tuple[Path, ...]] = {}

    def note(self, paths: Iterable[Path]) -> None:
        """Remember the state of files of which something is about to be read before they are
        digested."""
        self._states |= {path: _state(path) for path in paths}

    def digests(self, name: str, paths: tuple[Path, ...], fact_cache: FactCache) -> list[str]:
        """The digest of each file of a component, or of another thing that is loaded.

        Raises:
            WeightsError: a file changed since it was noted or digested.
        """
        self._require_files(name, paths)
        self._files[name] = paths
        return [self._digest(path, fact_cache) for path in paths]

    def require_unchanged(self, name: str, files: Callable[[], tuple[Path, ...]]) -> None:
        """Check that the files of a component are what they were when it was digested; nothing where
        it was not. To be called when no byte of them will be read any more.

        Raises:
            WeightsError: one is not.
        """
        if name in self._files:
            self._require_files(name, files())
            for path in self._files[name]:
                self._require_same(path)

    def _require_files(self, name: str, paths: tuple[Path, ...]) -> None:
        other = set(paths) ^ set(self._files.get(name, paths))
        if other:
            raise _changed(min(other))

    def _digest(self, path: Path, fact_cache: FactCache) -> str:
        if path in self._digests:
            self._require_same(path)
            return self._digests[path]
        state = self._states.setdefault(path, _state(path))
        digest = fact_cache.digest(path, self._again)
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
        self._states[path] = state  # it was only touched, or its folder moved to another disk


def _state(path: Path) -> FileState:
    """The state of a file. Raises `WeightsError` where there is none."""
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
