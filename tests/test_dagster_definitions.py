"""What a folder of recipes becomes in Dagster, before anything runs."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from conftest import ROOT
from dagster_support import definitions_of, failure_of, write_recipe
from hypothesis import given, settings
from hypothesis import strategies as st

from assets.common import code_version
from diffsynth_dagster.config import TrainingConfig, read_config
from diffsynth_dagster.config.recipe import RecipeOptions
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.versions import VERSIONS
from resources import load_recipes, recipes_folder

HUB = "Qwen/Qwen-Image"
SCRIPT = """
import sys, time
began = time.process_time()
import diffsynth_dagster.definitions as location
seconds = time.process_time() - began
import dagster as dg
dg.Definitions.validate_loadable(location.definitions)
heavy = {"torch", "diffusers", "transformers", "peft", "polars", "accelerate"} & set(sys.modules)
print(seconds, *sorted(heavy))
"""


def recipe(**overrides: Any) -> dict[str, Any]:
    """Parameters of a training whose files need not exist."""
    values: dict[str, Any] = {
        "dataset_base_path": "data/cats",
        "dataset_metadata_path": "data/cats/metadata.csv",
        "model_id_with_origin_paths": [f"{HUB}:transformer/*.safetensors", f"{HUB}:vae/*.bin"],
        "lora_base_model": "dit",
        "output_path": f"models/{len(overrides)}",
    }
    return {k: v for k, v in {**values, **overrides}.items() if v is not None}


def keys(definitions: dg.Definitions) -> set[str]:
    return {k.to_user_string() for k in definitions.resolve_asset_graph().get_all_asset_keys()}


def test_loads_in_three_seconds_without_torch(tmp_path: Path) -> None:
    for number in range(5):
        write_recipe(tmp_path, f"r{number}", recipe(output_path=f"models/{number}"))
    env = {**os.environ, "DIFFSYNTH_DAGSTER_RECIPES": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    seconds, *heavy = done.stdout.split()
    assert heavy == []
    assert float(seconds) < 3, "of a processor"


def test_assets_of_two_recipes_share_weights(tmp_path: Path) -> None:
    write_recipe(tmp_path, "a", recipe(output_path="models/a"))
    other = f"{HUB}:text_encoder/*.safetensors"
    tokenizer = f"{HUB}:tokenizer/"
    entries = [f"{HUB}:transformer/*.safetensors", other]
    write_recipe(
        tmp_path,
        "b",
        recipe(
            output_path="models/b",
            model_id_with_origin_paths=entries,
            tokenizer_path=tokenizer,
            retrain={"cron": "0 3 * * *", "when": "always"},
            description="Teaches b.",
        ),
    )
    definitions = definitions_of(tmp_path)
    dg.Definitions.validate_loadable(definitions)
    steps = ("metadata", "latents", "checkpoints", "exports", "promoted")
    shared = "weights/Qwen/Qwen-Image/transformer/all_safetensors"
    assert keys(definitions) == {
        *(f"{name}/{step}" for step in ("data", *steps) for name in "ab"),
        shared,
        "weights/Qwen/Qwen-Image/vae/all_bin",
        "weights/Qwen/Qwen-Image/text_encoder/all_safetensors",
        "weights/Qwen/Qwen-Image/tokenizer",
    }
    graph = definitions.resolve_asset_graph()
    parents = {p.to_user_string() for p in graph.get(dg.AssetKey(["b", "latents"])).parent_keys}
    assert parents >= {"b/metadata", shared, "weights/Qwen/Qwen-Image/tokenizer"}
    assert graph.get(dg.AssetKey(["b", "exports"])).parent_keys == {
        dg.AssetKey(["b", "checkpoints"])
    }
    assert graph.get(dg.AssetKey(["b", "checkpoints"])).pools == {"gpu"}
    assert "Teaches b." in (graph.get(dg.AssetKey(["b", "latents"])).description or "")
    job = definitions.resolve_job_def("train_b")
    assert {k.to_user_string() for k in job.asset_layer.executable_asset_keys} == {
        *(f"b/{step}" for step in ("data", *steps)),
        *(k for k in keys(definitions) if k.startswith("weights") and "vae" not in k),
    }
    schedule = definitions.resolve_schedule_def("retrain_b")
    assert schedule.cron_schedule == "0 3 * * *"
    assert schedule.default_status == dg.DefaultScheduleStatus.RUNNING
    with pytest.raises(dg.DagsterInvariantViolationError):
        definitions.resolve_schedule_def("retrain_a")


def test_another_recipe_changes_no_key(tmp_path: Path) -> None:
    """Of the same files under another glob, of a repository of another owner, of files beside."""
    usual = f"{HUB}:vae/diffusion_pytorch_model*.safetensors"
    write_recipe(tmp_path, "b", recipe(output_path="b", model_id_with_origin_paths=[usual]))
    before = keys(definitions_of(tmp_path))
    assert "weights/Qwen/Qwen-Image/vae" in before
    others = [
        f"{HUB}:vae/diffusion_pytorch_model.safetensors",
        f"{HUB}:vae/*.safetensors",
        f"{HUB}:vae/",
        "Other/Qwen-Image:vae/diffusion_pytorch_model*.safetensors",
    ]
    write_recipe(tmp_path, "a", recipe(output_path="a", model_id_with_origin_paths=others))
    added = keys(definitions_of(tmp_path)) - before
    assert {k for k in added if k.startswith("weights/")} == {
        "weights/Qwen/Qwen-Image/vae/diffusion_pytorch_model",
        "weights/Qwen/Qwen-Image/vae/all_safetensors",
        "weights/Qwen/Qwen-Image/vae/all",
        "weights/Other/Qwen-Image/vae",
    }
    assert keys(definitions_of(tmp_path)) >= before


def test_weights_that_are_named_alike_are_refused(tmp_path: Path) -> None:
    """By the names of Dagster's steps, and of sound recipes alone."""
    pair = ["Q/a:x-y.safetensors", "Q/a:x_y.safetensors"]
    for name, entry, folder in (
        ("a", pair[0], "a"),
        ("b", pair[1], "shared"),
        ("c", pair[0], "shared"),
        ("d", pair[1], "d"),
        ("e", "Q_a/x_y.safetensors", "e"),
    ):
        key = "model_id_with_origin_paths" if ":" in entry else "model_paths"
        values = {"model_id_with_origin_paths": None, key: [entry]}
        write_recipe(tmp_path, name, recipe(output_path=folder, **values))
    sound, broken = load_recipes(tmp_path)
    assert [r.name for r in sound] == ["a", "e"]
    said = {b.name: b.error.what for b in broken}
    assert "'output_path' is also that of" in said["b"]
    assert "'output_path' is also that of" in said["c"]
    assert "'Q/a:x_y.safetensors' would have the same asset as" in said["d"]
    dg.Definitions.validate_loadable(definitions_of(tmp_path))


def test_one_file_is_one_asset_however_it_is_written(tmp_path: Path) -> None:
    for name, path in (("a", "./none/dit.safetensors"), ("b", "none//dit.safetensors")):
        values = {"model_paths": [path], "model_id_with_origin_paths": None}
        write_recipe(tmp_path, name, recipe(output_path=name, **values))
    weights = {k for k in keys(definitions_of(tmp_path)) if k.startswith("weights/")}
    assert weights == {"weights/none/dit"}


def test_a_folder_of_a_model_is_not_that_of_its_tokenizer(tmp_path: Path) -> None:
    shards = [["none/x-1.safetensors", "none/x-2.safetensors"], "none/x-1.safetensors", "none/vl"]
    values = {
        "model_paths": shards,
        "model_id_with_origin_paths": None,
        "tokenizer_path": "none/vl",
    }
    write_recipe(tmp_path, "a", recipe(**values))
    write_recipe(tmp_path, "b", recipe(output_path="b", tokenizer_path="/"))
    names = {k for k in keys(definitions_of(tmp_path)) if k.startswith("weights/none/")}
    assert {re.sub("_[0-9a-f]{6}$", "_MARK", name) for name in names} == {
        "weights/none/x-1_MARK",
        "weights/none/x-1",
        "weights/none/vl/all",
        "weights/none/vl",
    }


def test_names_in_other_scripts_stay_apart(tmp_path: Path) -> None:
    for index, name in enumerate(("猫", "狗", "weights", "weights__x")):
        write_recipe(tmp_path, name, recipe(output_path=f"{index}"))
    sound, broken = load_recipes(tmp_path)
    assert len({r.name for r in sound}) == 2
    assert {b.name for b in broken} == {"weights", "weights__x"}
    dg.Definitions.validate_loadable(definitions_of(tmp_path))


def test_recipes_that_are_named_alike_are_refused(tmp_path: Path) -> None:
    """A new file takes over nobody's history."""
    write_recipe(tmp_path, "cat-lora", recipe(output_path="a"))
    assert [r.name for r in load_recipes(tmp_path)[0]] == ["cat_lora"]
    write_recipe(tmp_path, "cat lora", recipe(output_path="b"))
    sound, broken = load_recipes(tmp_path)
    assert sound == []
    assert [b.name for b in broken] == ["cat_lora"]
    assert "cat lora.yaml and cat-lora.yaml would have the same assets" in str(broken[0].error)
    dg.Definitions.validate_loadable(definitions_of(tmp_path))


def test_a_release_of_the_package_makes_nothing_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage whose version is raised, and no other."""
    write_recipe(tmp_path, "a", recipe())

    def versions() -> dict[str, str | None]:
        graph = definitions_of(tmp_path).resolve_asset_graph()
        return {k.to_user_string(): graph.get(k).code_version for k in graph.get_all_asset_keys()}

    before = versions()
    assert all(before.values())
    monkeypatch.setattr("diffsynth_dagster.__version__", "9.9.9")
    assert versions() == before
    monkeypatch.setitem(VERSIONS, "latents", 99)
    assert [k for k, version in versions().items() if version != before[k]] == ["a/latents"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (recipe(batch_sise=4), ["unknown parameter 'batch_sise'", "'batch_size'"]),
        (recipe(model_id_with_origin_paths=["Qwen"]), ["'Qwen' is not repository:pattern"]),
        (
            recipe(retrain={"cron": "often"}),
            ["'cron' = 'often' in 'retrain' is no cron expression"],
        ),
        (recipe(output_path="models/sound"), ["also that of the recipe 'sound'"]),
    ],
)
def test_broken_recipe_fails_by_itself(
    tmp_path: Path, values: dict[str, Any], words: list[str]
) -> None:
    write_recipe(tmp_path, "sound", recipe(output_path="models/sound"))
    path = write_recipe(tmp_path, "with typo", values)
    definitions = definitions_of(tmp_path)
    dg.Definitions.validate_loadable(definitions)
    assert "sound/checkpoints" in keys(definitions)
    job = definitions.resolve_job_def("train_with_typo")
    done = job.execute_in_process(raise_on_error=False)
    assert not done.success
    message = failure_of(done, "with_typo__metadata")
    assert str(path) in message
    assert all(word in message for word in words)
    assert not done.get_step_success_events()


HOSTILE = {
    "a date that is none": "seed: 2024-02-30",
    "a number without digits": "seed: 0x_",
    "a number of 5,000 digits": f"seed: {'9' * 5000}",
    "a hexadecimal number of 50,000 digits": f"seed: 0x{'f' * 50_000}",
    "a number of base 60 that is too large": f"learning_rate: {':'.join(['1'] * 500)}.0",
    "nested brackets": f"extra_inputs: {'[' * 3000}{']' * 3000}",
    "itself": "extra_inputs: &a [*a]",
    "an exponential list": "\n".join(
        [
            "sample_prompts:",
            "  - &a0 [x, x]",
            *(f"  - &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)),
        ]
    ),
    "a key that is a list": "? [a, b]\n: c",
    "half of a surrogate pair": 'description: "\\ud800"',
    "NUL": 'output_path: "a\\0b"',
    "another tag": "seed: !!python/object/apply:os.getcwd []",
    "bytes": "description: !!binary aGVsbG8=",
    "no text": b"description: \xff\xfe",
    "nothing": "",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_no_recipe_hides_the_others(tmp_path: Path, content: str | bytes) -> None:
    write_recipe(tmp_path, "sound", recipe(output_path="models/sound"))
    bad = tmp_path / "bad.yaml"
    bad.write_bytes(content.encode() if isinstance(content, str) else content)
    definitions = definitions_of(tmp_path)
    dg.Definitions.validate_loadable(definitions)
    assert {"sound/checkpoints", "bad/checkpoints"} <= keys(definitions)
    done = definitions.resolve_job_def("train_bad").execute_in_process(raise_on_error=False)
    message = failure_of(done, "bad__metadata")
    assert str(bad) in message
    assert len(message) < 2000
    assert "cannot be used" not in message, "it was foreseen"


@settings(max_examples=150, deadline=None)
@given(
    values=st.dictionaries(
        st.sampled_from(sorted({*TrainingConfig.model_fields, *RecipeOptions.model_fields})),
        st.text(max_size=20)
        | st.sampled_from(
            ["0x_", "1e999", "2024-02-30", "~", "[", "{", "&a", "*a", "!!set {a}", ".inf"]
        ),
        max_size=6,
    )
)
def test_any_text_for_any_parameter_is_a_recipe_or_refused(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, str]
) -> None:
    folder = tmp_path_factory.mktemp("recipes")
    write_recipe(folder, "sound", recipe(output_path="models/sound"))
    lines = [f"{name}: {text}" for name, text in values.items()]
    (folder / "bad.yaml").write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    sound, broken = load_recipes(folder)
    assert "sound" in {r.name for r in sound}
    assert not [b for b in broken if "cannot be used" in str(b.error)]


@pytest.mark.parametrize("value", ["2024-02-30", "2024-02-20", "2024-02-20 12:30:45"])
def test_what_looks_like_a_date_is_text(tmp_path: Path, value: str) -> None:
    path = write_recipe(tmp_path, "dated", recipe())
    path.write_text(path.read_text() + f"description: {value}\n")
    ((dated,), broken) = load_recipes(tmp_path)
    assert not broken
    assert dated.options.description == value


def test_two_recipes_with_one_folder_are_both_refused(tmp_path: Path) -> None:
    """Whose the files in it are cannot be told: a copy must not train over the original's."""
    write_recipe(tmp_path, "original", recipe(output_path="models/a"))
    write_recipe(tmp_path, "copy", recipe(output_path="models/../models/a"))
    write_recipe(tmp_path, "other", recipe(output_path="models/b")).rename(tmp_path / "other.yml")
    sound, broken = load_recipes(tmp_path)
    assert [r.name for r in sound] == ["other"]
    assert {b.name: b.error.what for b in broken} == {
        "original": "'output_path' is also that of the recipe 'copy'",
        "copy": "'output_path' is also that of the recipe 'original'",
    }


def test_folder_of_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFSYNTH_DAGSTER_RECIPES", raising=False)
    assert recipes_folder() == ROOT / "recipes"
    with pytest.raises(ParameterError, match="DIFFSYNTH_DAGSTER_RECIPES"):
        load_recipes(tmp_path / "none")


def test_recipes_that_do_half(tmp_path: Path) -> None:
    write_recipe(tmp_path, "encode", recipe(task="sft:data_process", output_path="a"))
    values = recipe(task="sft:train", dataset_metadata_path=None, output_path="b")
    write_recipe(tmp_path, "go_on", values)
    definitions = definitions_of(tmp_path)
    dg.Definitions.validate_loadable(definitions)
    assert {k for k in keys(definitions) if not k.startswith("weights/")} == {
        "encode/data",
        "encode/metadata",
        "encode/latents",
        "go_on/checkpoints",
        "go_on/exports",
        "go_on/promoted",
    }


def config(**overrides: Any) -> TrainingConfig:
    return read_config(recipe(**overrides), "the test")


def test_code_version_is_that_of_what_matters() -> None:
    from diffsynth_dagster.run.start import config_digest

    plain = config()
    for name, value, same in (
        ("learning_rate", 0.5, False),
        ("cache_path", "elsewhere", True),
        ("wandb_project", "x", True),
        ("num_epochs", 3, False),
        ("output_path", "elsewhere", True),
        ("dataset_num_workers", 2, True),
        ("task", "sft:train", True),
        ("task", "direct_distill", False),
        ("model_paths", ["a.safetensors"], True),
    ):
        other = config(**{name: value})
        versions = [code_version(c, "checkpoints") for c in (other, plain)]
        assert (versions[0] == versions[1]) == same, name
        assert (config_digest(other) == config_digest(plain)) == same, name
    # Another name of the same LoRA: a reason to look, not to train again.
    other = config(lora_checkpoint="a.safetensors")
    assert code_version(other, "checkpoints") != code_version(plain, "checkpoints")
    assert config_digest(other) == config_digest(plain)
