"""Turn a checkpoint into the files that other tools load.

What is named here is imported when it is used: promoting an export needs none of the large libraries.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffsynth_dagster.export.card import Card
    from diffsynth_dagster.export.chosen import chosen_checkpoint
    from diffsynth_dagster.export.exported import Exported
    from diffsynth_dagster.export.folder import Exports, export_folder, export_held
    from diffsynth_dagster.export.loading import how_to_load
    from diffsynth_dagster.export.run import export_run, verify_export

__all__ = [
    "Card",
    "Exported",
    "Exports",
    "chosen_checkpoint",
    "export_folder",
    "export_held",
    "export_run",
    "how_to_load",
    "verify_export",
]
_MODULES = {
    "Card": "card",
    "Exported": "exported",
    "Exports": "folder",
    "chosen_checkpoint": "chosen",
    "export_folder": "folder",
    "export_held": "folder",
    "export_run": "run",
    "how_to_load": "loading",
    "verify_export": "run",
}


def __getattr__(name: str) -> object:
    """Import what is asked for. Raises `AttributeError`: there is no such name."""
    if name not in _MODULES:
        raise AttributeError(name)
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
