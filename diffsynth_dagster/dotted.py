"""Objects named by a dotted path in a recipe."""

from importlib import import_module
from typing import Any

from diffsynth_dagster.errors import ParameterError


def import_dotted(path: str, parameter: str) -> Any:
    """The object that a dotted path names.

    Raises:
        ParameterError: there is no such module or attribute.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ParameterError(
            f"'{path}' cannot be imported: {error}",
            where=parameter,
            do="give package.module.name of something that Python can import",
        ) from error
