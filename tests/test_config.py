"""One list of parameters: flags, recipes and checks agree, and nothing is ignored."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from diffsynth_dagster.config import TrainingConfig, find_recipes, read_config, read_recipe
from diffsynth_dagster.config.flags import parser, read_arguments
from diffsynth_dagster.config.other_names import OTHER_NAMES
from diffsynth_dagster.config.recipe import RecipeOptions, dump_config
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.train import main
from diffsynth_dagster.training.join import precision

BASE: dict[str, Any] = {
    "dataset_base_path": "data",
    "dataset_metadata_path": "data/metadata.csv",
    "model_paths": '["dit.safetensors", ["a.safetensors", "b.safetensors"]]',
    "lora_base_model": "dit",
}
GUIDE = (
    *("dataset_base_path", "dataset_metadata_path", "dataset_repeat", "dataset_num_workers"),
    *("data_file_keys", "model_paths", "model_id_with_origin_paths", "extra_inputs", "fp8_models"),
    *("learning_rate", "num_epochs", "trainable_models", "find_unused_parameters", "weight_decay"),
    *("task", "output_path", "remove_prefix_in_ckpt", "save_steps", "lora_base_model"),
    *("lora_target_modules", "lora_rank", "lora_checkpoint", "preset_lora_path"),
    *("preset_lora_model", "use_gradient_checkpointing", "use_gradient_checkpointing_offload"),
    *("gradient_accumulation_steps", "height", "width", "max_pixels", "offload_models"),
    *("resume_from_checkpoint", "quant_options", "customized_optimizer"),
    *("template_model_id_or_path", "enable_lora_hot_loading", "enable_model_cpu_offload"),
    *("enable_optimizer_cpu_offload", "cpu_offload_split_threshold", "enable_tensorboard_log"),
    *("enable_swanlab_log", "swanlab_project", "enable_wandb_log", "wandb_project"),
    *("enable_csv_log", "num_frames", "tokenizer_path", "processor_path", "zero_cond_t"),
    *("initialize_model_on_cpu",),
)
DEFAULTS = {
    "dataset_repeat": 1,
    "dataset_num_workers": 0,
    "data_file_keys": ("image", "video"),
    "learning_rate": 1e-4,
    "num_epochs": 1,
    "weight_decay": 0.01,
    "task": "sft",
    "output_path": "./models",
    "remove_prefix_in_ckpt": "pipe.dit.",
    "save_steps": None,
    "lora_rank": 32,
    "gradient_accumulation_steps": 1,
    "max_pixels": 1048576,
    "swanlab_project": "DiffSynth-Studio",
}


def as_argv(values: dict[str, Any]) -> list[str]:
    argv: list[str] = []
    for name, value in values.items():
        switch = {True: [f"--{name}"], False: [f"--no-{name}"]}
        argv += switch[value] if isinstance(value, bool) else [f"--{name}", str(value)]
    return argv


def test_every_parameter_of_the_guide_is_a_flag_and_a_key() -> None:
    assert set(GUIDE) <= set(TrainingConfig.model_fields)
    flags = {s for a in parser()._actions for s in a.option_strings}
    assert {f"--{name}" for name in TrainingConfig.model_fields} <= flags


def test_defaults_are_those_of_the_guide() -> None:
    config = read_config(BASE, "test")
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS


def test_every_parameter_is_described() -> None:
    assert all(field.description for field in TrainingConfig.model_fields.values())
    assert isinstance(parser(), argparse.ArgumentParser)
    assert "100%" not in parser().format_help()


def test_flags_and_recipe_give_the_same_config(tmp_path: Path) -> None:
    values = {
        **BASE,
        "lora_target_modules": "to_q,to_k",
        "learning_rate": "1e-5",
        "use_gradient_checkpointing": True,
        "height": 64,
        "width": 32,
    }
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                **values,
                "lora_target_modules": ["to_q", "to_k"],
                "model_paths": ["dit.safetensors", ["a.safetensors", "b.safetensors"]],
            }
        )
    )
    assert read_arguments(as_argv(values)).config == read_recipe(recipe).config


def test_flags_override_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({**BASE, "seed": 1, "retrain": {"cron": "0 3 * * *"}}))
    config = read_arguments(["--recipe", str(recipe), "--seed", "2"]).config
    assert config.seed == 2
    assert config.lora_base_model == ("dit",)
    retrain = read_recipe(recipe).options.retrain
    assert retrain is not None
    assert retrain.cron == "0 3 * * *"


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 2**63 - 1),
            "learning_rate": st.floats(1e-12, 1e3),
            "batch_size": st.integers(1, 10**6),
            "sample_prompts": st.lists(st.text(min_size=1), max_size=3),
            "lora_target_modules": st.lists(st.sampled_from(["to_q", "ffn.0"]), unique=True),
            "output_path": st.text(min_size=1),
            "save_steps": st.none() | st.integers(1, 100),
        },
    )
)
def test_a_written_config_reads_back(values: dict[str, Any]) -> None:
    config = read_config({**BASE, **values}, "test")
    assert read_config(yaml.safe_load(dump_config(config)), "test") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_rnk": 3}, "unknown parameter --lora_rnk; did you mean 'lora_rank'?"),
        ({"network_dim": 3}, "unknown parameter --network_dim; network_dim is lora_rank here"),
        ({"lora_rank": 0}, "--lora_rank = '0': input should be greater than or equal to 1"),
        ({"lora_rank": "many"}, "--lora_rank = 'many'"),
        ({"task": "sftt"}, "--task = 'sftt'"),
        ({"model_paths": '["a",]'}, "--model_paths = .* is not JSON"),
        ({"height": 64}, "--height and --width go together"),
        ({"offload_models": "a:b"}, "--offload_models is not supported yet"),
        ({"template_model_id_or_path": "a"}, "--template_model_id_or_path is not supported yet"),
        ({"trainable_models": "dit"}, "is in --trainable_models and is --lora_base_model as well"),
        ({"seed": -1}, "--seed"),
        ({"learning_rate": "inf"}, "--learning_rate = 'inf'"),
        ({"output_path": ""}, "--output_path = ''"),
        ({"lora_dropout": 1.0}, "--lora_dropout"),
        (
            {"use_gradient_checkpointing": False, "use_gradient_checkpointing_offload": True},
            "--use_gradient_checkpointing switches off",
        ),
        ({"max_rejected_fraction": 1.1}, "--max_rejected_fraction"),
    ],
)
def test_wrong_flags_are_refused_with_one_message(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        read_arguments(as_argv({**BASE, **change}))


def test_names_of_other_trainers_lead_to_parameters() -> None:
    known = {*TrainingConfig.model_fields, *RecipeOptions.model_fields}
    named = {name for here in OTHER_NAMES.values() for name in re.findall(r"`(\w+)`", here)}
    assert named <= known
    assert not known & OTHER_NAMES.keys()
    for name, here in OTHER_NAMES.items():
        with pytest.raises(ParameterError) as error:
            read_config({**BASE, name: 1}, "test")
        assert f"{name} is {here.replace('`', '')} here" in error.value.what


def test_a_recipe_with_the_name_of_another_trainer_is_told_its_own(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**BASE, "Resolution": 1024}))
    with pytest.raises(
        ParameterError, match=r"Resolution is max_pixels .*, or height and width here"
    ):
        read_recipe(recipe)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("dataset_base_path", "--dataset_base_path is missing"),
        ("model_paths", "no model is named"),
        ("lora_base_model", "nothing is trained"),
    ],
)
def test_what_is_missing_is_named(missing: str, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        read_arguments(as_argv({k: v for k, v in BASE.items() if k != missing}))


def test_an_empty_text_leaves_a_parameter_out() -> None:
    empty = {"lora_checkpoint": "", "preset_lora_path": "", "quant_options": "", "family": ""}
    assert read_arguments(as_argv({**BASE, **empty})).config == read_config(BASE, "test")
    with pytest.raises(ParameterError, match="nothing is trained"):
        read_arguments(as_argv({**BASE, "lora_base_model": ""}))


def test_words_that_belong_to_no_flag_are_refused() -> None:
    with pytest.raises(ParameterError, match="'stray' belongs to no flag"):
        read_arguments([*as_argv(BASE), "stray"])
    with pytest.raises(ParameterError, match="'True' belongs to no flag") as error:
        read_arguments([*as_argv(BASE), "--find_unused_parameters", "True"])
    assert "take no value" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "the key 'seed' stands twice"),
        ("seed: [1", "not YAML"),
        ("- a\n", "not a mapping"),
        ("lerning_rate: 1\n", "did you mean 'learning_rate'"),
        ("retrian: x\n", "did you mean 'retrain'"),
        ("schedule: x\n", "'schedule' is now `retrain: {cron: …}`"),
        ("", "not a mapping"),
    ],
)
def test_wrong_recipes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(text)
    with pytest.raises(ParameterError, match=message) as error:
        read_recipe(recipe)
    assert str(recipe) in str(error.value)


def test_recipes_of_the_project_are_valid() -> None:
    read_recipe(ROOT / "recipes" / "demo_base" / "recipe.yaml")
    # In a fresh checkout the code location shows the demo, and nothing that is not for a user.
    assert {recipe.name for recipe in find_recipes(ROOT / "recipes")} == {"demo"}
    for path in (ROOT / "recipes" / "examples").rglob("*.yaml"):
        read_recipe(path)


GUIDE_COMMAND = [
    *("--dataset_base_path", "data/example_image_dataset"),
    *("--dataset_metadata_path", "data/example_image_dataset/metadata.csv"),
    *("--max_pixels", "1048576", "--dataset_repeat", "50"),
    "--model_id_with_origin_paths",
    "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors,Qwen/Qwen-Image:"
    "text_encoder/model*.safetensors,Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors",
    *("--learning_rate", "1e-5", "--num_epochs", "2", "--remove_prefix_in_ckpt", "pipe.dit."),
    *("--output_path", "./models/train/Qwen-Image_full", "--trainable_models", "dit"),
    *("--use_gradient_checkpointing", "--find_unused_parameters"),
]


def test_the_guides_command_prints_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*GUIDE_COMMAND, "--dry_run", "--no_files"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["family"] == "qwen_image"
    assert plan["components"]["vae"].endswith("vae/diffusion_pytorch_model.safetensors")
    assert plan["trained"] == {"full": ["dit"], "lora": None}
    assert plan["stages"] == {"cached": ["prompt", "image"], "in_step": []}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], True),
        (["--no-use_gradient_checkpointing"], False),
        (["--use_gradient_checkpointing_offload"], True),
    ],
)
def test_videos_are_trained_with_gradient_checkpointing(
    flags: list[str], expected: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the guide's commands for Wan expect, which do not ask for it."""
    command = [word for word in GUIDE_COMMAND if word != "--use_gradient_checkpointing"]
    models = "Wan-AI/Wan2.1-T2V-1.3B:diffusion_pytorch_model*.safetensors"
    wan = [*command, "--model_id_with_origin_paths", models]
    assert main([*wan, *flags, "--dry_run", "--no_files"]) == 0
    assert json.loads(capsys.readouterr().out)["gradient_checkpointing"] is expected
    assert main([*command, "--dry_run", "--no_files"]) == 0
    assert json.loads(capsys.readouterr().out)["gradient_checkpointing"] is False


@pytest.mark.parametrize(
    ("asked", "gpu", "launcher", "expected"),
    [
        (None, True, None, "bf16"),
        (None, True, "no", "bf16"),
        (None, True, "fp16", None),
        (None, False, "no", None),
        ("no", True, "bf16", "no"),
        ("fp16", False, "no", "fp16"),
    ],
)
def test_a_gpu_computes_in_bf16_unless_told_otherwise(
    asked: str | None,
    gpu: bool,
    launcher: str | None,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """None leaves it to accelerate."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launcher is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    assert precision(asked, gpu) == expected


def test_the_stage_rule_decides_what_is_cached(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*GUIDE_COMMAND, "--trainable_models", "text_encoder", "--dry_run", "--no_files"]
    assert main(argv) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["stages"] == {"cached": ["image"], "in_step": ["prompt"]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--family", "anima"], "the family 'anima' is not supported yet"),
        (["--family", "qwen_imag"], "did you mean 'qwen_image'"),
        (["--trainable_models", "dot"], "qwen_image has no model 'dot'; did you mean 'dit'"),
        (["--height", "100", "--width", "64"], "height = 100 is not a multiple of 16"),
        (["--extra_inputs", "edit_imag"], "reads no column 'edit_imag'; did you mean 'edit_image'"),
        (
            ["--extra_inputs", "edit_image", "--edit_plus"],
            "reads files from the column 'edit_image'",
        ),
        (["--data_file_keys", "image,edit_image"], "data_file_keys is about edit images"),
        (["--processor_path", "a"], "processor_path is about edit images"),
        (["--zero_cond_t"], "zero_cond_t is about edit images"),
        (["--data_file_keys", "video"], "reads no file column 'video'"),
        (["--remove_prefix_in_ckpt", "pipe.vae."], "no trained tensor starts with 'pipe.vae.'"),
        (["--max_pixels", "100"], "less than the smallest image of 16x16"),
        (
            ["--max_pixels", "65536", "--height", "64", "--width", "64"],
            "max_pixels has no effect when height and width are given",
        ),
        (["--lora_rank", "64"], "--lora_rank is given but no --lora_base_model"),
        (["--lora_dropout", "0.3"], "--lora_dropout is given but no --lora_base_model"),
        (["--fp8_models", "foo"], "'foo' is no entry of the model list"),
        (["--customized_evaluation", "nothing.here"], "nothing.here"),
        (["--learning_rate", "1e38"], "input should be less than or equal to 1000"),
        (["--customized_optimizer", "os.path.join"], "is of Python's standard library"),
        (["--customized_optimizer", "torch.nn.Linear"], "this is no optimizer class of torch"),
        (["--customized_optimizer", "torch.optim.LBFGS"], "evaluates the model several times"),
        (["--customized_optimizer", "torch.optim.SparseAdam"], "the optimizer cannot be made"),
        (
            ["--lr_scheduler", "polynomial", "--learning_rate", "1e-8"],
            "the learning rate cannot take this course",
        ),
    ],
)
def test_what_does_not_fit_the_family_is_refused(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*GUIDE_COMMAND, *flags, "--dry_run"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err
    assert "Traceback" not in output.err
