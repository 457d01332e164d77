"""Who is told that a run failed: a function of the user's, or an address."""

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
"""How long an address has to answer."""
HOOK_SECONDS = 30.0
"""How long a function may take: Dagster ends the evaluation of a sensor after 60 s."""


@dataclass(frozen=True)
class FailedRun:
    """What is told of a run that failed.

    Attributes:
        text: all of it in one text, under the name by which Slack and Mattermost take it.
        recipe: its name; several with commas between; empty where the run had assets of none.
        reason: what a person reads first: what happened, where, and what to do.
        when: the end of the run, in UTC (ISO 8601).
    """

    text: str
    recipe: str
    run_id: str
    job: str
    reason: str
    when: str


class NotTold(DiffSynthError):
    """The function raised, or the address did not take it."""


Tell = Callable[[FailedRun], None]


def find_listener() -> Tell | None:
    """What the environment names; None where it names nothing.

    Raises:
        ParameterError: there is no such function, it does not take one argument, or it is no address.
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
    except ValueError:  # a port that is none
        return False


def _call(hook: Callable[..., Any], name: str, failed: FailedRun) -> None:
    """Call a function of the user's. Raises `NotTold`."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            hook(asdict(failed))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the function may do anything
            errors.append(error)

    thread = Thread(target=work, name="tell a failure", daemon=True)
    thread.start()
    thread.join(HOOK_SECONDS)
    if thread.is_alive():
        raise NotTold(f"'{name}' did not return within {HOOK_SECONDS:.0f} s")
    for error in errors:
        raise NotTold(f"'{name}' raised {type(error).__name__}: {reason_of(error)}") from error


def _post(address: str, failed: FailedRun) -> None:
    """Send a failure as JSON. Raises `NotTold`; the address is not in its message, since it may hold a
    password."""
    import http.client
    import urllib.error
    import urllib.request

    class NoRedirect(urllib.request.HTTPRedirectHandler):
        """A redirected POST would become a GET without what it has to say."""

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
            answer.read(1)
    except urllib.error.HTTPError as error:
        raise NotTold(f"{host} answered {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise NotTold(f"{host} did not answer: {reason}") from None
