"""Objects named by a dotted path in a recipe: code of the user's, which is imported and called."""

import inspect
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from diffsynth_dagster.errors import ParameterError, reason_of


def check_dotted(path: str, parameter: str) -> None:
    """Check a dotted path without looking for what it names.

    Raises:
        ParameterError: it is no dotted path, or is of Python's standard library.
    """
    parts = path.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise _refused(f"'{path}' is no dotted path", parameter)
    _require_own(path, parts[0], parameter)


def find_dotted(path: str, parameter: str) -> None:
    """Look for the package of a dotted path, without importing anything.

    Raises:
        ParameterError: it is not there; or see `check_dotted`.
    """
    check_dotted(path, parameter)
    package = path.partition(".")[0]
    if package not in sys.modules and find_spec(package) is None:
        raise _refused(f"'{path}' cannot be imported: there is no '{package}'", parameter)


def import_dotted(path: str, parameter: str) -> Any:
    """The object that a dotted path names.

    Raises:
        ParameterError: there is no such module or attribute; or see `check_dotted`.
    """
    check_dotted(path, parameter)
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (Exception, SystemExit) as error:  # the module is code, which may do anything
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = "" if last.filename == __file__ else f" ({last.filename}, line {last.lineno})"
        raise _refused(
            f"'{path}' cannot be imported: {type(error).__name__}: {reason_of(error)}{place}",
            parameter,
        ) from error
    _require_own(path, _home(found), parameter)
    return found


def _home(found: Any) -> str:
    """The package that an object is of, where it is the very one that its module has: other modules
    show what they import, and what wraps a function says it is of that one's module."""
    module, name = getattr(found, "__module__", None), getattr(found, "__name__", "")
    there = getattr(sys.modules.get(str(module)), str(name), None)
    return str(module).partition(".")[0] if there is found else ""


def import_function(path: str, parameter: str, *arguments: str) -> Callable[..., Any]:
    """The function that a dotted path names.

    Args:
        arguments: what it will be called with, for messages.

    Raises:
        ParameterError: it is no function, or does not take them; or see `import_dotted`.
    """
    found = import_dotted(path, parameter)
    if not callable(found):
        raise _refused(f"'{path}' is no function", parameter)
    try:
        inspect.signature(found).bind(*arguments)
    except TypeError as error:
        raise _refused(
            f"'{path}' cannot be called with ({', '.join(arguments)}): {error}", parameter
        ) from error
    except ValueError:  # one in C may not say what it takes
        pass
    return found


def _require_own(path: str, package: str, parameter: str) -> None:
    if package in sys.stdlib_module_names:
        raise _refused(f"'{path}' is of Python's standard library", parameter)


def _refused(what: str, parameter: str) -> ParameterError:
    return ParameterError(
        what,
        where=parameter,
        do="give package.module.name of something of yours that Python can import",
    )
