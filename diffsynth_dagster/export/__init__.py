"""Turn a checkpoint into the files that other tools load."""

from diffsynth_dagster.export.run import Exported, chosen_checkpoint, export_run, verify_export

__all__ = ["Exported", "chosen_checkpoint", "export_run", "verify_export"]
