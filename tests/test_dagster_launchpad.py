"""What the Launchpad of a job shows, takes and refuses, and what of it reaches the run."""

from collections.abc import Iterable, Mapping
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._core.snap.snap_to_yaml import default_values_yaml_from_type_snap
from dagster_support import definitions_of, write_recipe
from parameter_changes import ALTERNATIVES

from assets.common import asset_key
from diffsynth_dagster.config import TrainingConfig, read_config
from diffsynth_dagster.config.parameters import MARKS
from diffsynth_dagster.errors import ParameterError
from resources import LAUNCHER, PARAMETERS, Parameters

RECIPE: dict[str, Any] = {
    "family": "qwen_image",
    "dataset_base_path": "none",
    "dataset_metadata_path": "none/metadata.csv",
    "model_paths": [["none/dit-1.safetensors", "none/dit-2.safetensors"], "none/vae.safetensors"],
    "lora_base_model": "dit",
    "lr_scheduler": "cosine",
    "mixed_precision": "no",
    "learning_rate": 0.00002,
    "optimizer_arguments": {"betas": [0.9, 0.95]},
    "export_formats": ["kohya", "peft"],
    "output_path": "none/a",
}
OPTIONS = {"num_processes": 2}
OPTIONAL: dict[str, Any] = {
    "height": 64,
    "width": 64,
    "lora_alpha": 16,
    "timestep_shift": 3.0,
    "checkpoint_format": "guide",
    "lora_target_modules": ["to_q"],
    "background": "white",
    "use_gradient_checkpointing": False,
}
"""Parameters that may be left out, set."""


@pytest.fixture(scope="module")
def definitions(tmp_path_factory: pytest.TempPathFactory) -> dg.Definitions:
    folder = tmp_path_factory.mktemp("recipes")
    write_recipe(folder, "a", {**RECIPE, **OPTIONS, "retries": 0})
    write_recipe(folder, "optional", {**RECIPE, **OPTIONAL, "output_path": "none/optional"})
    write_recipe(folder, "encode", {**RECIPE, "output_path": "b", "task": "sft:data_process"})
    write_recipe(folder, "broken", {"num_epoch": 9})
    return definitions_of(folder)


@pytest.fixture(scope="module")
def job(definitions: dg.Definitions) -> dg.JobDefinition:
    return definitions.resolve_job_def("train_a")


def config_of(values: Mapping[str, Any]) -> TrainingConfig:
    return read_config(dict(values), "the test")


def shown(job: dg.JobDefinition) -> dict[str, Any]:
    """What the editor holds when the Launchpad is opened, as the UI sends it when it is launched."""
    kind = job.run_config_schema.config_type
    snapshot = kind.schema_snapshot
    return yaml.safe_load(
        default_values_yaml_from_type_snap(snapshot, snapshot.get_config_snap(kind.key))
    )


def applied(job: dg.JobDefinition, run_config: dict[str, Any], recipe: TrainingConfig) -> Any:
    """What a run trains with."""
    config = dg.validate_run_config(job, run_config)["resources"][PARAMETERS]["config"]
    return Parameters(**config).apply(recipe)


def settable(changes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """As many of these changes as the recipe can have together."""
    together: dict[str, Any] = {}
    for change in changes:
        if "task" in change or any(MARKS[name].planned for name in change):
            continue
        try:
            config_of({**RECIPE, **together, **change})
        except ParameterError:
            continue
        together.update(change)
    return together


def refused(job: dg.JobDefinition, run_config: dict[str, Any]) -> str:
    with pytest.raises(dg.DagsterInvalidConfigError) as caught:
        dg.validate_run_config(job, run_config)
    return str(caught.value)


def test_launchpad_shows_the_values_of_the_recipe(job: dg.JobDefinition) -> None:
    """As they are written there, and the options of a run."""
    values = shown(job)
    assert {name: values[name] for name in RECIPE} == {**RECIPE, "lora_base_model": ["dit"]}
    assert values["num_epochs"] == 1
    assert values["num_processes"] == 2
    assert values["retrain"] is False
    assert values["grace_seconds"] == 10.0
    assert values["log_level"] == "INFO"
    assert "task" not in values


def test_what_is_shown_is_a_run_without_config(definitions: dg.Definitions) -> None:
    for name in ("train_a", "train_optional", "train_encode"):
        job = definitions.resolve_job_def(name)
        assert dg.validate_run_config(job, shown(job)) == dg.validate_run_config(job, {})
        parameters = dg.validate_run_config(job, {})["resources"][PARAMETERS]["config"]
        assert not Parameters(**parameters).given()


@pytest.mark.parametrize(
    ("run_config", "words"),
    [
        ({"lr_scheduler": "cosin"}, "root:lr_scheduler not in enum type lr_scheduler got cosin"),
        ({"export_formats": ["khoya"]}, "not in enum type export_formats got khoya"),
        ({"log_level": "LOUD"}, "not in enum type log_level got LOUD"),
        ({"num_epochs": "two"}, "root:num_epochs"),
        ({"num_epochs": None}, "root:num_epochs must not be None"),
        ({"num_epoch": 2}, 'unexpected config entry "num_epoch" at the root'),
        ({"task": "sft"}, 'unexpected config entry "task" at the root'),
        (
            {"resources": {PARAMETERS: {"config": {"num_epochs": 2}}}},
            'unexpected config entry "resources" at the root',
        ),
        ({"execution": {"config": {"max_concurrent": 2}}}, '"max_concurrent" at path root:exec'),
    ],
)
def test_what_is_wrong_is_refused_before_launch(
    job: dg.JobDefinition, run_config: dict[str, Any], words: str
) -> None:
    assert words in refused(job, run_config)


def test_every_parameter_reaches_the_run(job: dg.JobDefinition) -> None:
    """In the form in which it is shown."""
    own, tried = config_of(RECIPE), set[str]()
    waiting = [change for change in ALTERNATIVES.values() if isinstance(change, Mapping)]
    while together := settable(waiting):
        values = config_of({**RECIPE, **together}).model_dump(mode="json")
        flat = {name: values[name] for name in together}
        assert applied(job, flat, own) == config_of({**RECIPE, **together})
        waiting = [change for change in waiting if not change.items() <= together.items()]
        tried |= flat.keys()
    assert len(tried) > 60
    for name, value in (
        ("timestep_shift", 3.0),
        ("learning_rates", {"dit": 0.5}),
        ("model_paths", ["b.safetensors", ["c-1.safetensors", "c-2.safetensors"]]),
    ):
        assert applied(job, {name: value}, own) == config_of({**RECIPE, name: value})


def test_null_leaves_out_what_the_recipe_sets(definitions: dg.Definitions) -> None:
    flat = dict.fromkeys(OPTIONAL)
    recipe = config_of({**RECIPE, **OPTIONAL})
    job = definitions.resolve_job_def("train_optional")
    assert applied(job, flat, recipe) == config_of(RECIPE)


def test_options_go_where_dagster_has_them(job: dg.JobDefinition) -> None:
    before = dg.validate_run_config(job, {})
    assert before["resources"][LAUNCHER]["config"]["num_processes"] is None, "the recipe's"
    flat = {
        "num_processes": 3,
        "accelerate_config": "accelerate.yaml",
        "grace_seconds": 5,
        "retrain": True,
        "log_level": "DEBUG",
        "execution": {"config": {"retries": {"disabled": {}}}},
    }
    config = dg.validate_run_config(job, flat)
    assert config["resources"][LAUNCHER]["config"] == {
        "num_processes": 3,
        "accelerate_config": "accelerate.yaml",
        "grace_seconds": 5,
    }
    assert config["ops"]["a__checkpoints"]["config"] == {"retrain": True}
    (logger,) = config["loggers"].values()
    assert logger["config"] == {"log_level": "DEBUG"}
    assert config["execution"] == {"in_process": {"retries": {"disabled": {}}}}
    assert config["resources"][PARAMETERS] == before["resources"][PARAMETERS]


def test_a_part_of_a_job_takes_the_same_config(job: dg.JobDefinition) -> None:
    """Options of what is not in it too: the Launchpad shows them all the same."""
    part = job.get_subset(asset_selection={asset_key("a", "metadata")})
    flat = {**shown(job), "retrain": True, "num_epochs": 9, "num_processes": 3}
    config = dg.validate_run_config(part, flat)
    assert Parameters(**config["resources"][PARAMETERS]["config"]).given() == {"num_epochs": 9}


def test_recipes_without_a_training_or_parameters(definitions: dg.Definitions) -> None:
    assert "retrain" not in shown(definitions.resolve_job_def("train_encode"))
    broken = definitions.resolve_job_def("train_broken")
    assert shown(broken) == {"log_level": "INFO"}
    assert "loggers" in dg.validate_run_config(broken, {"log_level": "DEBUG", "num_epochs": 2})


def test_assets_picked_in_the_graph(definitions: dg.Definitions) -> None:
    """They may be of any recipe, so their run config is Dagster's own."""
    job = definitions.resolve_implicit_global_asset_job_def()

    def nested(**values: Any) -> dict[str, Any]:
        return {"resources": {PARAMETERS: {"config": values}}}

    assert "not in enum type lr_scheduler got cosin" in refused(job, nested(lr_scheduler="cosin"))
    assert "got khoya" in refused(job, nested(export_formats=["khoya"]))
    assert "got num_epochs" in refused(job, nested(left_out=["num_epochs"]))
    changes = nested(lr_scheduler="linear", export_formats=["guide"], left_out=["lora_alpha"])
    ran = applied(job, changes, config_of({**RECIPE, "lora_alpha": 4}))
    assert ran == config_of({**RECIPE, "lr_scheduler": "linear", "export_formats": ["guide"]})


def test_run_config_overrides_a_recipe() -> None:
    plain = read_config(RECIPE, "the test")
    assert Parameters().apply(plain) == plain
    changed = Parameters(
        num_epochs=7,
        lora_target_modules=["to_q", "to_k"],
        model_paths='["a.safetensors", ["b-1.safetensors", "b-2.safetensors"]]',
        lr_scheduler="linear",
    ).apply(plain)
    assert changed.num_epochs == 7
    assert changed.lora_target_modules == ("to_q", "to_k")
    assert changed.model_paths == ("a.safetensors", ("b-1.safetensors", "b-2.safetensors"))
    assert changed.lr_scheduler == "linear"
    assert changed.dataset_base_path == plain.dataset_base_path
    with pytest.raises(ParameterError, match="num_epochs") as caught:
        Parameters(num_epochs=0).apply(plain)
    assert caught.value.where == "the run config"


def test_run_config_has_every_parameter_that_a_run_may_set() -> None:
    planned = {
        name
        for name, field in TrainingConfig.model_fields.items()
        if (field.json_schema_extra or {}).get("planned")  # pyright: ignore
    }
    shown = set(Parameters.model_fields)
    assert shown == (set(TrainingConfig.model_fields) - planned - {"task"}) | {"left_out"}
    field = Parameters.model_fields["num_epochs"]
    assert (field.description or "").startswith("Number of epochs.")
