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
        with user_errors():
            ran = launched(context, recipe, diffsynth_parameters)
            seen = look(context, "exports", ran)
            same = seen.unchanged()
        if same is not None:
            return same
        # Only now: these import torch, which takes seconds.
        from diffsynth_dagster.export import export_folder
        from diffsynth_dagster.facts import digest_of

        with user_errors():
            exported = export_folder(ran.config, diffsynth_hub.open())
        effect = exported.effect
        if effect is not None and effect.is_nothing:
            context.log.warning(f"the LoRA: {effect}")
        card = exported.card
        if card is not None and card.kept:
            context.log.info(f"{card.path} was edited, and stays as it is")
        if exported.unfinished is not None:
            context.log.warning(
                f"the training is unfinished: its checkpoint of {exported.unfinished} was exported"
            )
        files = exported.files
        return dg.MaterializeResult(
            metadata={
                **({} if exported.unfinished is None else {"unfinished": exported.unfinished}),
                "files": table(
                    {
                        "file": str(item.path),
                        "format": item.format,
                        "component": ", ".join(item.components),
                        "tensors": item.tensors,
                        "bytes": item.bytes,
                        "blake3": item.digest,
                    }
                    for item in files
                ),
                **({} if exported.effect is None else {"change_of_weights": str(exported.effect)}),
                **({} if card is None else _card_facts(card)),
                "folder": dg.MetadataValue.path(str(files[0].path.parent.absolute())),
                **ran.facts,
            },
            data_version=dg.DataVersion(digest_of([item.digest for item in files])),
            # The export of an unfinished training gets a code version that no recipe has, so that
            # it is stale until the training ends. A change upstream would not do: the training may
            # end in a checkpoint that the asset checkpoints already had before.
            tags={CODE_VERSION: "unfinished"}
            if exported.unfinished is not None
            else seen.tags
            if exported.problems
            else seen.marked,
            check_results=[_check(exported)],
        )

    return exports


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
