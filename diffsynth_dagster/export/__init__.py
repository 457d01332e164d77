"""Turn a checkpoint into the files that other tools load."""

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
