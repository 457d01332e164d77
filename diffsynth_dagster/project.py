"""Find the root of a project, and the files that a new project starts with.

These are the templates of recipes, `workspace.yaml` and `dagster.yaml`.

In a checkout, both are the root of the checkout. If the package was installed from a wheel, the
files are inside the package (see `setup.py`), and the project is the working directory.
"""

from pathlib import Path

_PACKAGED = Path(__file__).parent / "project_files"  # exists only in an installed package


def own_files() -> Path:
    """The folder with this package's `recipes/examples/`, `recipes/accelerate/`, `workspace.yaml`
    and `dagster_home/dagster.yaml`."""
    return _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[1]


def project_root() -> Path:
    """The folder that contains `recipes/`: the root of a checkout, or the working directory if the
    package was installed."""
    return Path.cwd() if _PACKAGED.is_dir() else Path(__file__).parents[1]


def ui_command() -> str:
    """The command that starts Dagster's UI, to be run in the project's root."""
    return "dagster dev" if _PACKAGED.is_dir() else "make ui"
