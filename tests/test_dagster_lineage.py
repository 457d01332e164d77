"""What a recipe reads from the run folder of another is an edge between their assets."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster_support import definitions_of, write_recipe

from diffsynth_dagster.config.entries import ModelEntry

MODEL = "none/dit.safetensors"
STEPS = {"metadata", "latents", "checkpoints", "exports", "promoted"}


def short(key: dg.AssetKey) -> str:
    """A key in one word; of weights with the last part of their name."""
    return f"weights/{key.path[-1]}" if key.path[0] == "weights" else key.to_user_string()


class Recipes:
    """A folder of recipes, each with a run folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, name: str, file: str = "") -> str:
        """The run folder of a recipe, or a file in it."""
        return str(self.folder / "runs" / name / file)

    def add(self, name: str, models: tuple[str, ...] = (MODEL,), **overrides: Any) -> None:
        values: dict[str, Any] = {
            "family": "qwen_image",
            "dataset_base_path": "none",
            "dataset_metadata_path": "none/metadata.csv",
            "model_paths": list(models),
            "lora_base_model": "dit",
            "output_path": self.run(name),
            **overrides,
        }
        given = {key: value for key, value in values.items() if value is not None}
        write_recipe(self.folder / "recipes", name, given)

    @property
    def definitions(self) -> dg.Definitions:
        definitions = definitions_of(self.folder / "recipes")
        dg.Definitions.validate_loadable(definitions)
        return definitions

    def edges(self) -> dict[str, set[str]]:
        """Asset → assets of other recipes that it depends on."""
        graph = self.definitions.resolve_asset_graph()
        found: dict[str, set[str]] = {}
        for key in graph.get_all_asset_keys():
            parents = graph.get(key).parent_keys
            others = {p for p in parents if p.path[0] not in (key.path[0], "weights")}
            if others:
                found[short(key)] = {short(parent) for parent in others}
        return found

    def job(self, name: str) -> set[str]:
        """The assets of a recipe's job."""
        layer = self.definitions.resolve_job_def(f"train_{name}").asset_layer
        return {short(key) for key in layer.executable_asset_keys}


@pytest.fixture
def recipes(tmp_path: Path) -> Recipes:
    made = Recipes(tmp_path)
    made.add("first")
    return made


@pytest.mark.parametrize(
    ("overrides", "file", "edges"),
    [
        ("dataset_metadata_path", "metadata.parquet", {"metadata": "metadata"}),
        ("validation_metadata_path", "held_out/metadata.parquet", {"metadata": "metadata"}),
        ("dataset_base_path", "samples", {"metadata": "checkpoints"}),
        (
            "preset_lora_path",
            "exports/diffusers/lora.safetensors",
            {"latents": "exports", "checkpoints": "exports"},
        ),
        ("lora_checkpoint", "epoch-0.safetensors", {"checkpoints": "checkpoints"}),
        ("lora_checkpoint", "exports/current/checkpoint.safetensors", {"checkpoints": "promoted"}),
        ("lora_checkpoint", "exports/promoted/0123456789ab/checkpoint.safetensors", {}),
        ("lora_checkpoint", "older/2026-11-30T01-52-07/epoch-0.safetensors", {}),
    ],
)
def test_files_of_a_run_folder_are_edges(
    recipes: Recipes, overrides: str, file: str, edges: dict[str, str]
) -> None:
    recipes.add("next", **{overrides: recipes.run("first", file)})
    assert recipes.edges() == {f"next/{to}": {f"first/{from_}"} for to, from_ in edges.items()}


def test_promoted_version_is_an_edge_as_a_model_too(recipes: Recipes) -> None:
    """Before anything is promoted and after, and by a link of a person's own."""
    current = Path(recipes.run("first", "exports/current"))
    version = current.with_name("promoted") / "0123456789ab"
    link = recipes.folder / "link"
    link.symlink_to(current)
    dit = "diffusers/transformer/diffusion_pytorch_model.safetensors"
    recipes.add("next", (str(current / dit),), lora_checkpoint=str(link / "checkpoint.safetensors"))
    edges = recipes.edges()
    assert set(edges) > {"next/checkpoints"}
    assert all(parents == {"first/promoted"} for parents in edges.values())
    version.mkdir(parents=True)
    current.symlink_to("promoted/0123456789ab")
    assert recipes.edges() == edges


def test_encoded_samples_are_an_edge(recipes: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by another path of the same folder, and where the other recipe only encodes."""
    recipes.add("encode", task="sft:data_process")
    monkeypatch.chdir(recipes.folder)
    link = recipes.folder / "link"
    link.symlink_to("runs")
    half = {"task": "sft:train", "dataset_metadata_path": None}
    recipes.add("next", **half, dataset_base_path="runs/../runs/encode/")
    recipes.add("linked", **half, dataset_base_path=str(link / "encode"))
    assert recipes.edges() == {f"{n}/checkpoints": {"encode/latents"} for n in ("next", "linked")}
    own = {f"next/{step}" for step in ("checkpoints", "exports", "promoted")}
    assert recipes.job("next") == {*own, "weights/dit"}


def test_job_trains_its_own_recipe_alone(recipes: Recipes) -> None:
    """A model that another recipe trained is one of its weights; that training is not in its job."""
    control = recipes.run("first", "step-5.safetensors")
    recipes.add(
        "next", (MODEL, control), lora_checkpoint=recipes.run("first", "step-5.safetensors")
    )
    weights = "weights/" + ModelEntry("model_paths", paths=(control,)).name[-1]
    assert recipes.edges() == {
        weights: {"first/checkpoints"},
        "next/checkpoints": {"first/checkpoints"},
    }
    own = {f"next/{step}" for step in STEPS}
    assert recipes.job("next") == {*own, weights, "weights/dit"}
    assert recipes.job("first") == {*(f"first/{step}" for step in STEPS), "weights/dit"}


def test_circles_have_no_edges(recipes: Recipes) -> None:
    """Recipes that go on from each other, through a file or through a model, or from themselves."""
    recipes.add("a", lora_checkpoint=recipes.run("c", "epoch-0.safetensors"))
    recipes.add("b", (MODEL, recipes.run("a", "epoch-0.safetensors")))
    recipes.add("c", lora_checkpoint=recipes.run("b", "epoch-0.safetensors"))
    recipes.add("again", (MODEL, recipes.run("again", "epoch-0.safetensors")))
    recipes.add("next", lora_checkpoint=recipes.run("c", "epoch-0.safetensors"))
    assert recipes.edges() == {"next/checkpoints": {"c/checkpoints"}}
    # Of a model that its maker names too.
    recipes.add("other", (MODEL, recipes.run("again", "epoch-0.safetensors")))
    assert recipes.edges() == {"next/checkpoints": {"c/checkpoints"}}


def test_run_folder_in_a_run_folder(recipes: Recipes) -> None:
    recipes.add("inner", output_path=recipes.run("first", "inner"))
    recipes.add("next", lora_checkpoint=recipes.run("first", "inner/epoch-0.safetensors"))
    assert recipes.edges() == {"next/checkpoints": {"inner/checkpoints"}}
