"""Export the checkpoint of a run folder: for the asset `exports`, and at the end of a training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffsynth_dagster.cache.split import with_settled
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import OutputError, UserError
from diffsynth_dagster.export.card import Card, write_card
from diffsynth_dagster.export.chosen import Chosen, chosen_checkpoint, step_of
from diffsynth_dagster.export.exported import Exported
from diffsynth_dagster.export.listing import Listing, forget_listing, list_files, write_listing
from diffsynth_dagster.export.lora_effect import Effect, effect_of
from diffsynth_dagster.export.run import export_checkpoint, verify_export
from diffsynth_dagster.run.folder import owned
from diffsynth_dagster.run.record import RunRecord, read_record
from diffsynth_dagster.training.overlap import refuse_overlap
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.resolved import ResolvedModel


@dataclass(frozen=True)
class Exports:
    """The result of an export.

    Attributes:
        files: the exported files.
        unfinished: see `chosen.Chosen`.
        problems: an error for each file that does not load in its tool.
        effect: how much the LoRAs change the model; None if no LoRA was exported.
        card: the model card; None if there are problems.
    """

    files: list[Exported]
    unfinished: str | None
    problems: list[UserError]
    effect: Effect | None = None
    card: Card | None = None


def export_folder(config: TrainingConfig, hub: ModelHub) -> Exports:
    """Export the checkpoint of a finished or unfinished training. Locks the run folder meanwhile.

    Raises:
        OutputError: the folder has no undamaged checkpoint, is in use, or cannot be written.
        UserError: see `with_settled`, `find_model`.
    """
    folder = Path(config.output_path)
    _require_record(folder)  # before locking: that would create the folder
    config = with_settled(config)
    refuse_overlap(config)
    found = find_model(config, hub)
    with owned(folder, "exporting"):
        # Read again under the lock: a training may have begun in the meantime.
        return export_locked(config, _require_record(folder), found)


def export_locked(config: TrainingConfig, record: RunRecord, model: ResolvedModel) -> Exports:
    """Export the checkpoint of a run folder that the caller has locked: write the files, load each
    the way its tool does, and write the model card.

    Raises:
        OutputError: see `chosen_checkpoint`; or the folder cannot be written.
    """
    chosen = chosen_checkpoint(config, record, model.family)
    # Removed first and written last: if this process is killed, no listing names half an export.
    forget_listing(Path(config.output_path))
    files = export_checkpoint(config, record, model, chosen)
    problems: list[UserError] = []
    for item in files:
        try:
            verify_export(item, model)
        except UserError as error:
            # Go on: the other files may be fine, and all problems are reported together.
            problems.append(error)
    loras = {name: lora for item in files for name, lora in item.trained.items()}
    effect = effect_of(loras, record.weight_norms) if loras else None
    card = None if problems else write_card(config, record, model, chosen, files)
    _list(Path(config.output_path), record, chosen, files, loads=not problems)
    return Exports(files, chosen.unfinished, problems, effect, card)


def _list(
    folder: Path, record: RunRecord, chosen: Chosen, files: Sequence[Exported], loads: bool
) -> None:
    """Write `exports/exported.json`. Raises `OutputError`."""
    write_listing(
        folder,
        Listing(
            training=record.identity,
            step=step_of(chosen.paths[0]),
            unfinished=chosen.unfinished,
            loads=loads,
            checkpoints={path.name: record.checkpoints[path.name] for path in chosen.paths},
            files=list_files(folder / "exports", {item.path: item.digest for item in files}),
        ),
    )


def _require_record(folder: Path) -> RunRecord:
    """The record of the training in a run folder. Raises `OutputError` if there is none."""
    record = read_record(folder)
    if record is None:
        raise OutputError(
            "the run folder holds no training",
            where=str(folder.absolute()),
            do="train first (in Dagster: materialize the checkpoints)",
        )
    return record
