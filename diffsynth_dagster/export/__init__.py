"""Turn a checkpoint into the files that other tools load.

The modules are imported on first use: promoting an export needs no torch and no diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffsynth_dagster.export.card import Card
    from diffsynth_dagster.export.chosen import chosen_checkpoint
    from diffsynth_dagster.export.exported import Exported
    from diffsynth_dagster.export.folder import Exports, export_folder, export_locked
    from diffsynth_dagster.export.loading import how_to_load
    from diffsynth_dagster.export.run import export_run, verify_export

__all__ = [
    "Card",
    "Exported",
    "Exports",
    "chosen_checkpoint",
    "export_folder",
    "export_locked",
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
    "export_locked": "folder",
    "export_run": "run",
    "how_to_load": "loading",
    "verify_export": "run",
}


def __getattr__(name: str) -> object:
    """Import a name on first use. Raises `AttributeError` if the package has no such name."""
    if name not in _MODULES:
        raise AttributeError(name)
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
