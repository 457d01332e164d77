"""Import the user's own code, which a recipe names by a dotted path such as
`package.module.name`."""

import inspect
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from diffsynth_dagster.errors import ParameterError, reason_of


def check_dotted(path: str, parameter: str) -> None:
    """Check the form of a dotted path, without looking for the module.

    Raises:
        ParameterError: it is not a dotted path, or names something of Python's standard library.
    """
    parts = path.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise _refused(f"'{path}' is no dotted path", parameter)
    _require_own(path, parts[0], parameter)


def find_dotted(path: str, parameter: str) -> None:
    """Check that the package of a dotted path exists, without importing anything.

    Raises:
        ParameterError: the package does not exist; or see `check_dotted`.
    """
    check_dotted(path, parameter)
    package = path.partition(".")[0]
    if package not in sys.modules and find_spec(package) is None:
        raise _refused(f"'{path}' cannot be imported: there is no '{package}'", parameter)


def import_dotted(path: str, parameter: str) -> Any:
    """Import the object that a dotted path names.

    Raises:
        ParameterError: the module or attribute does not exist, or importing it fails; or see
            `check_dotted`.
    """
    check_dotted(path, parameter)
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (Exception, SystemExit) as error:  # importing runs the user's code: anything may happen
        # Name the line of the user's code, unless the import itself failed here.
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = "" if last.filename == __file__ else f" ({last.filename}, line {last.lineno})"
        raise _refused(
            f"'{path}' cannot be imported: {type(error).__name__}: {reason_of(error)}{place}",
            parameter,
        ) from error
    # Again for the object, since a module of the user may have imported it: `mine.system`.
    _require_own(path, _package_of(found), parameter)
    return found


def _package_of(found: Any) -> str:
    """The package that defines an object; empty if that is not certain."""
    module, name = getattr(found, "__module__", None), getattr(found, "__name__", "")
    # A wrapper (functools.wraps) copies `__module__` and `__name__` of the function inside. So ask
    # whether the module has this very object.
    defined = getattr(sys.modules.get(str(module)), str(name), None)
    return str(module).partition(".")[0] if defined is found else ""


def import_function(path: str, parameter: str, *arguments: str) -> Callable[..., Any]:
    """Import the function that a dotted path names.

    Args:
        arguments: names of the positional arguments that it will be called with.

    Raises:
        ParameterError: it is not callable, or does not take these arguments; or see
            `import_dotted`.
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
    except ValueError:  # some functions written in C have no signature
        pass
    return found


def _require_own(path: str, package: str, parameter: str) -> None:
    """Refuse the standard library: a recipe from somebody else must not call `os.system`."""
    if package in sys.stdlib_module_names:
        raise _refused(f"'{path}' is of Python's standard library", parameter)


def _refused(what: str, parameter: str) -> ParameterError:
    return ParameterError(
        what,
        where=parameter,
        do="give package.module.name of something of yours that Python can import",
    )
