"""Objects named by a dotted path in a recipe: code of the user's, which is imported and called."""

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from diffsynth_dagster.errors import ParameterError


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
    except (ImportError, AttributeError, ValueError) as error:
        raise _refused(f"'{path}' cannot be imported: {error}", parameter) from error
    # Other packages show what they import themselves.
    _require_own(path, str(getattr(found, "__module__", "")).partition(".")[0], parameter)
    return found


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
