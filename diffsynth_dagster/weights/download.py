"""List the files of a ModelScope repository, check the list, then download the wanted files.

File names come from the hub and are not trusted: if one would be written outside the repository's
folder, nothing is downloaded.
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
"""Time limit for the list of a repository's files. For downloads the client has its own limit:
`MODELSCOPE_DOWNLOAD_TIMEOUT` seconds without a byte."""
_AT_ONCE = 4
"""Number of files that are downloaded in parallel."""

_Result = TypeVar("_Result")


def download(repository: str, wanted: Sequence[str], folder: Path, where: str) -> None:
    """Download the wanted files of a repository that are not in the folder yet.

    Args:
        repository: `owner/name`.
        wanted: patterns of paths; see `matches`.
        folder: where the repository's files are stored.
        where: the parameter that names them, for messages.

    Raises:
        DownloadError: the hub does not answer, sends a malformed list, does not have the repository
            or lists a file outside it; then nothing is written. Or a file could not be downloaded;
            the next call continues it.
    """
    from modelscope_hub.errors import HubError
    from requests import RequestException

    try:
        api, listed = _within(LISTING_SECONDS, lambda: _list_files(repository))
        _require_inside(listed, repository, where)
        chosen = [f for f in listed if any(matches(f.path, pattern) for pattern in wanted)]
        # The form in which the client itself gets the list; it checks the sizes and digests.
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
            do="check the repository's name and the network, and start it again: it goes on with "
            "what it has. How long a download waits for the next byte is "
            "MODELSCOPE_DOWNLOAD_TIMEOUT. With all files there, set DIFFSYNTH_SKIP_DOWNLOAD=True",
        ) from error


def matches(path: str, pattern: str) -> bool:
    """Whether a path within a repository matches a pattern. A `*` never matches a `/`."""
    # Compared folder by folder, since the `*` of fnmatch matches a `/` too.
    names, globs = PurePosixPath(path).parts, PurePosixPath(pattern).parts
    return len(names) == len(globs) and all(map(fnmatchcase, names, globs))


def _list_files(repository: str) -> "tuple[HubApi, list[FileInfo]]":
    """A client for the site that hosts the repository, and the list of the repository's files.

    Raises:
        ValueError: the list is malformed.
        HubError, RequestException: the hub does not answer or does not have the repository.
    """
    from modelscope_hub import HubApi
    from modelscope_hub.errors import HubError
    from requests import RequestException

    api = HubApi()
    # Some repositories are on the international site. If asking for the site fails, the default
    # site gives the better error message.
    with suppress(HubError, RequestException):
        api = HubApi(endpoint=api.resolve_endpoint_for_read(repository))
    try:
        listed = api.list_repo_files(repository, "model")
    except (AttributeError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(f"the hub's list of files is malformed ({error})") from error
    paths: list[object] = [f.path for f in listed]  # the client does not check JSON's types
    if not all(isinstance(path, str) for path in paths):
        raise ValueError("the hub's list of files is malformed (a path is no text)")
    return api, listed


def _require_inside(listed: "Iterable[FileInfo]", repository: str, where: str) -> None:
    """Check that every listed path stays inside the folder that the repository is downloaded to.

    Raises:
        DownloadError: a path leaves the folder, or cannot be a file name.
    """
    for path in (f.path for f in listed):
        parts = path.split("/")
        # A backslash separates folders on Windows.
        if {"", ".", ".."}.isdisjoint(parts) and "\\" not in path and is_text(path):
            continue
        raise DownloadError(
            f"the hub lists a file that would lie outside '{repository}': '{path}'",
            where=where,
            do="nothing was downloaded; do not use this repository, and tell the hub",
        )


def _within(seconds: float, call: Callable[[], _Result]) -> _Result:
    """Return the result of a call, or raise its error. Raises `TimeoutError` after some seconds;
    the call then runs on in its thread."""
    future: Future[_Result] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except Exception as error:  # noqa: BLE001 - raised again by the thread that waits
            future.set_exception(error)

    # A daemon thread: a call that never returns does not keep the process from ending.
    Thread(target=work, daemon=True, name="hub-listing").start()
    try:
        return future.result(timeout=seconds)
    except TimeoutError:
        raise TimeoutError(f"the list of its files did not come in {seconds:g} seconds") from None
