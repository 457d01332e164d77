"""Turn a checkpoint into the files that other tools load."""

from diffsynth_dagster.export.run import Exported, export_run, newest_checkpoint, verify_export

__all__ = ["Exported", "export_run", "newest_checkpoint", "verify_export"]
