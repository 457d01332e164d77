"""Reports a failed run to a function of the user's, or to a web address."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from threading import Thread
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from diffsynth_dagster.dotted import import_function
from diffsynth_dagster.errors import DiffSynthError, ParameterError, reason_of

if TYPE_CHECKING:
    from http.client import HTTPResponse

VARIABLE = "DIFFSYNTH_DAGSTER_ON_FAILURE"
ANSWER_SECONDS = 10.0
"""Seconds within which an address must answer."""
HOOK_SECONDS = 30.0
"""Seconds that a function may take. Dagster ends the tick of a sensor after 60 s."""


@dataclass(frozen=True)
class FailedRun:
    """The report of a failed run. Its field names are the keys of the JSON that is sent.

    Attributes:
        text: the whole report as one text. Slack and Mattermost expect it under this name.
        recipe: name of the recipe; several are separated by commas; empty if the run had none.
        reason: what happened, where, and what to do.
        when: end of the run, in UTC (ISO 8601).
    """

    text: str
    recipe: str
    run_id: str
    job: str
    reason: str
    when: str


class NotTold(DiffSynthError):
    """The report failed: the function raised or took too long, or the address did not accept it."""


Tell = Callable[[FailedRun], None]


def find_listener() -> Tell | None:
    """The listener that the environment variable names, as a function; None if it is not set.

    Raises:
        ParameterError: there is no such function, it does not take one argument, or the address is
            not a valid one.
    """
    given = os.environ.get(VARIABLE, "").strip()
    if not given:
        return None
    if "://" not in given:
        hook = import_function(given.replace(":", ".", 1), VARIABLE, "failure")
        return lambda failed: _call(hook, given, failed)
    if not _is_address(given):
        raise ParameterError(
            "this is no address that a failure can be sent to",
            where=VARIABLE,
            do="give http://… or https://…, or a function of yours as package.module:name",
        )
    return lambda failed: _post(given, failed)


def _is_address(given: str) -> bool:
    try:
        parts = urlsplit(given)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is not a number
        return False


def _call(hook: Callable[..., Any], name: str, failed: FailedRun) -> None:
    """Call a function of the user's. Raises `NotTold`."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            hook(asdict(failed))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the function may do anything
            errors.append(error)

    # In a daemon thread: when it hangs it can be left behind, and does not keep the process alive.
    thread = Thread(target=work, name="tell a failure", daemon=True)
    thread.start()
    thread.join(HOOK_SECONDS)
    if thread.is_alive():
        raise NotTold(f"'{name}' did not return within {HOOK_SECONDS:.0f} s")
    for error in errors:
        raise NotTold(f"'{name}' raised {type(error).__name__}: {reason_of(error)}") from error


def _post(address: str, failed: FailedRun) -> None:
    """Send a failure as JSON. Raises `NotTold`, whose message has only the host: the rest of the
    address may be a secret."""
    import http.client
    import urllib.error
    import urllib.request

    class NoRedirect(urllib.request.HTTPRedirectHandler):
        """Refuses redirects: urllib would turn the POST into a GET without its body."""

        def redirect_request(
            self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any
        ) -> None:
            return None

    request = urllib.request.Request(
        address,
        data=json.dumps(asdict(failed)).encode(),
        headers={"Content-Type": "application/json"},
        method="POST",
    )
    host = urlsplit(address).hostname
    try:
        answer: HTTPResponse
        with urllib.request.build_opener(NoRedirect).open(
            request, timeout=ANSWER_SECONDS
        ) as answer:
            answer.read(1)  # the status is enough, the body does not matter
    except urllib.error.HTTPError as error:
        # `from None`, since urllib's own errors may hold the address.
        raise NotTold(f"{host} answered {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise NotTold(f"{host} did not answer: {reason}") from None
