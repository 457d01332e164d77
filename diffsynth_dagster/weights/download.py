"""Files of a repository on ModelScope: listed, checked, and only then downloaded.

A hub is not trusted with names: what it lists is written below the folder of the repository, or
not at all.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from threading import Thread
from typing import TYPE_CHECKING, TypeVar

from diffsynth_dagster.errors import DownloadError, is_text

if TYPE_CHECKING:
    from modelscope_hub import HubApi
    from modelscope_hub.types import FileInfo

LISTING_SECONDS = 120.0
"""How long a hub may take to list the files of a repository. A download has the client's own limit,
of `MODELSCOPE_DOWNLOAD_TIMEOUT` seconds without a byte."""
_AT_ONCE = 4
"""Files that are downloaded side by side."""

_Result = TypeVar("_Result")


def download(repository: str, wanted: Sequence[str], folder: Path, where: str) -> None:
    """Download what is missing of a repository.

    Args:
        repository: `owner/name`.
        wanted: patterns of paths; see `matches`.
        folder: where the repository's files lie.
        where: the parameter that names them, for messages.

    Raises:
        DownloadError: the hub does not answer, answers nonsense, lacks the repository or lists a
            file outside it; nothing is written then. Or a file could not be downloaded: the next call
            goes on with what came of it.
    """
    from modelscope_hub.errors import HubError
    from requests import RequestException

    try:
        api, listed = _within(LISTING_SECONDS, lambda: _list_files(repository))
        _require_inside(listed, repository, where)
        chosen = [f for f in listed if any(matches(f.path, pattern) for pattern in wanted)]
        entries = [
            {"Path": f.path, "Size": f.size or None, "Sha256": f.sha256}
            for f in chosen
            if not f.is_dir
        ]
        # Few at a time: the client tries every file it is given, so that with a hub that stalls a
        # model of a hundred files would take hours to fail.
        for start in range(0, len(entries), _AT_ONCE):
            some = entries[start : start + _AT_ONCE]
            api.download_repo(
                repository, "model", local_dir=folder, file_list=some, max_workers=_AT_ONCE
            )
    except (HubError, RequestException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DownloadError(
            f"'{repository}' could not be downloaded: {reason}",
            where=where,
            do="check the repository's name and the network, and start it again: it goes on with what it "
            "has. How long a download waits for the next byte is MODELSCOPE_DOWNLOAD_TIMEOUT. With all "
            "files there, set DIFFSYNTH_SKIP_DOWNLOAD=True",
        ) from error


def matches(path: str, pattern: str) -> bool:
    """Whether a path within a repository fits a pattern. A `*` stands for names, or parts of them,
    in one folder: it does not stand for a `/`."""
    names, globs = PurePosixPath(path).parts, PurePosixPath(pattern).parts
    return len(names) == len(globs) and all(map(fnmatchcase, names, globs))


def _list_files(repository: str) -> "tuple[HubApi, list[FileInfo]]":
    """The client for the site that has the repository, and all of the repository's files.

    Raises:
        ValueError: the list is malformed.
    """
    from modelscope_hub import HubApi
    from modelscope_hub.errors import HubError
    from requests import RequestException

    api = HubApi()
    with suppress(HubError, RequestException):  # the usual site then says what is wrong
        api = HubApi(endpoint=api.resolve_endpoint_for_read(repository))
    try:
        listed = api.list_repo_files(repository, "model")
    except (AttributeError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(f"the hub's list of files is malformed ({error})") from error
    paths: list[object] = [f.path for f in listed]  # the client passes on any type of JSON's
    if not all(isinstance(path, str) for path in paths):
        raise ValueError("the hub's list of files is malformed (a path is no text)")
    return api, listed


def _require_inside(listed: "Iterable[FileInfo]", repository: str, where: str) -> None:
    """Check that every file lies below the folder that the repository is downloaded to.

    Raises:
        DownloadError: one does not, or has a name that no file can have.
    """
    for path in (f.path for f in listed):
        parts = path.split("/")
        if {"", ".", ".."}.isdisjoint(parts) and "\\" not in path and is_text(path):
            continue
        raise DownloadError(
            f"the hub lists a file that would lie outside '{repository}': '{path}'",
            where=where,
            do="nothing was downloaded; do not use this repository, and tell the hub",
        )


def _within(seconds: float, call: Callable[[], _Result]) -> _Result:
    """The result of a call; what it raises is raised here. Raises `TimeoutError` when it takes too
    long, and leaves it to itself then."""
    future: Future[_Result] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except Exception as error:  # noqa: BLE001 - raised again by the thread that waits
            future.set_exception(error)

    # A daemon: a call that never returns must not keep the process from ending.
    Thread(target=work, daemon=True, name="hub-listing").start()
    try:
        return future.result(timeout=seconds)
    except TimeoutError:
        raise TimeoutError(f"the list of its files did not come in {seconds:g} seconds") from None
