"""Export what a run folder holds: what the asset `exports` does, and the trainer after its last step."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffsynth_dagster.cache.split import with_settled
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import OutputError, UserError
from diffsynth_dagster.export.card import Card, write_card
from diffsynth_dagster.export.chosen import Chosen, chosen_checkpoint, step_of
from diffsynth_dagster.export.effect import Effect, effect_of
from diffsynth_dagster.export.exported import Exported
from diffsynth_dagster.export.listing import Listing, forget_listing, list_files, write_listing
from diffsynth_dagster.export.run import export_checkpoint, verify_export
from diffsynth_dagster.run.folder import owned
from diffsynth_dagster.run.record import RunRecord, read_record
from diffsynth_dagster.training.overlap import refuse_overlap
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.resolved import ResolvedModel


@dataclass(frozen=True)
class Exports:
    """What was exported.

    Attributes:
        unfinished: see `chosen.Chosen`.
        problems: of the files that the loader of their tool does not take.
        effect: what the LoRAs change; None where there are none.
        card: the model card beside them; None where there are problems.
    """

    files: list[Exported]
    unfinished: str | None
    problems: list[UserError]
    effect: Effect | None = None
    card: Card | None = None


def export_folder(config: TrainingConfig, hub: ModelHub) -> Exports:
    """Export the checkpoint of a run folder, finished or not, and hold the folder meanwhile.

    Raises:
        OutputError: it holds no whole checkpoint, or someone else holds it, or it cannot be written.
        UserError: see `with_settled`, `find_model`.
    """
    folder = Path(config.output_path)
    _require_record(folder)  # before anything is made in the folder
    config = with_settled(config)
    refuse_overlap(config)
    found = find_model(config, hub)
    with owned(folder, "exporting"):
        return export_held(config, _require_record(folder), found)


def export_held(config: TrainingConfig, record: RunRecord, found: ResolvedModel) -> Exports:
    """Export the checkpoint of a run folder that is held, let the loader of its tool try each file, and
    write the model card.

    Raises:
        OutputError: see `chosen_checkpoint`; or the folder cannot be written.
    """
    chosen = chosen_checkpoint(config, record, found.family)
    forget_listing(Path(config.output_path))
    files = export_checkpoint(config, record, found, chosen)
    problems: list[UserError] = []
    for item in files:
        try:
            verify_export(item, found)
        except UserError as error:
            problems.append(error)
    loras = {name: lora for item in files for name, lora in item.trained.items()}
    effect = effect_of(loras, record.weight_norms) if loras else None
    card = None if problems else write_card(config, record, found, chosen, files)
    _list(Path(config.output_path), record, chosen, files, loads=not problems)
    return Exports(files, chosen.unfinished, problems, effect, card)


def _list(
    folder: Path, record: RunRecord, chosen: Chosen, files: Sequence[Exported], loads: bool
) -> None:
    """Write down what was exported. Raises `OutputError`."""
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
    record = read_record(folder)
    if record is None:
        raise OutputError(
            "the run folder holds no training",
            where=str(folder.absolute()),
            do="train first (in Dagster: materialize the checkpoints)",
        )
    return record
