"""`<recipe>/exports`: the files that other tools load."""

from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg

from assets.common import asset_key, code_version, description, table, user_errors
from diffsynth_dagster.config import Recipe
from resources import Hub, Parameters

if TYPE_CHECKING:
    from diffsynth_dagster.export import Exported
    from diffsynth_dagster.weights.identify import FoundModel

CHECK = "export_loads"


def make_exports(recipe: Recipe) -> dg.AssetsDefinition:
    """The exports asset of a recipe, with its check."""
    key = asset_key(recipe.name, "exports")

    @dg.asset(
        key=key,
        deps=[asset_key(recipe.name, "checkpoints")],
        group_name=recipe.name,
        kinds={"diffusers", "safetensors"},
        description=description(recipe, "The newest checkpoint as files that other tools load."),
        code_version=code_version(recipe.config, "exports"),
        check_specs=[
            dg.AssetCheckSpec(
                CHECK, asset=key, description="The loader of the target takes every file."
            )
        ],
    )
    def exports(parameters: Parameters, hub: Hub) -> dg.MaterializeResult:
        from diffsynth_dagster.cache.split import with_settled
        from diffsynth_dagster.errors import OutputError
        from diffsynth_dagster.export import export_run
        from diffsynth_dagster.facts import digest_of
        from diffsynth_dagster.run_folder import owned
        from diffsynth_dagster.training.overlap import refuse_overlap
        from diffsynth_dagster.training.record import read_record
        from diffsynth_dagster.weights.identify import find_model

        with user_errors():
            config = parameters.apply(recipe.config)
            record = read_record(Path(config.output_path))
            if record is None or not record.finished:
                raise OutputError(
                    "the run folder holds no finished training",
                    where=config.output_path,
                    do=f"materialize {recipe.name}/checkpoints first",
                )
            config = with_settled(config)
            refuse_overlap(config)
            found = find_model(config, hub.open())
            with owned(Path(config.output_path), "exporting"):
                exported = export_run(config, record, found)
                check = _check(exported, found)
        return dg.MaterializeResult(
            metadata={
                "files": table(
                    {
                        "file": str(item.path),
                        "format": item.format,
                        "component": ", ".join(item.components),
                        "tensors": item.tensors,
                        "bytes": item.bytes,
                        "blake3": item.digest,
                    }
                    for item in exported
                ),
                "folder": dg.MetadataValue.path(str(exported[0].path.parent.absolute())),
            },
            data_version=dg.DataVersion(digest_of([item.digest for item in exported])),
            check_results=[check],
        )

    return exports


def _check(exported: "list[Exported]", found: "FoundModel") -> dg.AssetCheckResult:
    """Let the target's loader try each file."""
    from diffsynth_dagster.errors import UserError
    from diffsynth_dagster.export import verify_export

    problems: list[str] = []
    for item in exported:
        try:
            verify_export(item, found)
        except UserError as error:
            problems.append(str(error))
    return dg.AssetCheckResult(
        check_name=CHECK,
        passed=not problems,
        description="\n".join(problems) or f"all {len(exported)} load",
        metadata={"files": len(exported), "files_that_do_not_load": len(problems)},
    )
