"""`<recipe>/exports`: the trained weights as files that other tools load."""

from typing import TYPE_CHECKING

import dagster as dg

from assets.common import asset_key, code_version, description, table, user_errors
from assets.launched import CODE_VERSION, launched, step_tags
from assets.unchanged import look
from diffsynth_dagster.config import Recipe
from resources import Hub, Parameters

if TYPE_CHECKING:
    from diffsynth_dagster.export import Card, Exports

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
        op_tags=step_tags(recipe),
        check_specs=[
            dg.AssetCheckSpec(
                CHECK,
                asset=key,
                blocking=True,
                description="The tool that each file is for takes it, and applies what was trained.",
            )
        ],
    )
    def exports(
        context: dg.AssetExecutionContext, diffsynth_parameters: Parameters, diffsynth_hub: Hub
    ) -> dg.MaterializeResult:
        return _export(context, recipe, diffsynth_parameters, diffsynth_hub)

    return exports


def _export(
    context: dg.AssetExecutionContext, recipe: Recipe, parameters: Parameters, hub: Hub
) -> dg.MaterializeResult:
    """The work of the step: export the newest checkpoint, then describe the files."""
    with user_errors():
        ran = launched(context, recipe, parameters)
        seen = look(context, "exports", ran)
        same = seen.unchanged()
    if same is not None:
        return same
    # Only now: these import torch, which takes seconds.
    from diffsynth_dagster.export import export_folder
    from diffsynth_dagster.facts import digest_of

    with user_errors():
        exported = export_folder(ran.config, hub.open())
    effect, card, unfinished = exported.effect, exported.card, exported.unfinished
    if effect is not None and effect.is_nothing:
        context.log.warning(f"the LoRA: {effect}")
    if card is not None and card.kept:
        context.log.info(f"{card.path} was edited, and stays as it is")
    if unfinished is None:
        tags = seen.tags if exported.problems else seen.marked
    else:
        context.log.warning(
            f"the training is unfinished: its checkpoint of {unfinished} was exported"
        )
        # The export of an unfinished training gets a code version that no recipe has, so that it is
        # stale until the training ends. A change upstream would not do: the training may end in a
        # checkpoint that the asset checkpoints already had before.
        tags = {CODE_VERSION: "unfinished"}
    return dg.MaterializeResult(
        metadata={
            **({} if unfinished is None else {"unfinished": unfinished}),
            "files": _files(exported),
            **({} if effect is None else {"change_of_weights": str(effect)}),
            **({} if card is None else _card_facts(card)),
            "folder": dg.MetadataValue.path(str(exported.files[0].path.parent.absolute())),
            **ran.facts,
        },
        data_version=dg.DataVersion(digest_of([item.digest for item in exported.files])),
        tags=tags,
        check_results=[_check(exported)],
    )


def _files(exported: "Exports") -> dg.TableMetadataValue:
    """The exported files as a table."""
    return table(
        {
            "file": str(item.path),
            "format": item.format,
            "component": ", ".join(item.components),
            "tensors": item.tensors,
            "bytes": item.bytes,
            "blake3": item.digest,
        }
        for item in exported.files
    )


def _card_facts(card: "Card") -> dict[str, dg.MetadataValue]:
    """Metadata with the model card and its path."""
    return {
        "card": dg.MetadataValue.md(card.shown),
        "card_file": dg.MetadataValue.path(str(card.path.absolute())),
    }


def _check(exported: "Exports") -> dg.AssetCheckResult:
    """The check's result: whether each file loads in the tool that it is for."""
    problems = exported.problems
    return dg.AssetCheckResult(
        check_name=CHECK,
        passed=not problems,
        description="\n".join(map(str, problems)) or f"all {len(exported.files)} load",
        metadata={"files": len(exported.files), "files_that_do_not_load": len(problems)},
    )
