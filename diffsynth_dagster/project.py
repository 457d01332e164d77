"""What a project begins with (templates, `workspace.yaml`, `dagster.yaml`), and where its root is.

In a checkout, all of it lies in the checkout's root. Where the package was installed from a wheel, the files lie in
the package (see `setup.py`), and the project is the working directory.
"""

from pathlib import Path

_PACKAGED = Path(__file__).parent / "project_files"


def own_files() -> Path:
    """The folder that holds `recipes/examples/`, `recipes/accelerate/`, `workspace.yaml` and
    `dagster_home/dagster.yaml` as they come with this package."""
    return _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[1]


def project_root() -> Path:
    """The folder that `recipes/` lies in: the root of a checkout; of a package that was installed, the
    working directory."""
    return Path.cwd() if _PACKAGED.is_dir() else Path(__file__).parents[1]


def ui_command() -> str:
    """The command that starts the UI in the project's root."""
    return "dagster dev" if _PACKAGED.is_dir() else "make ui"
