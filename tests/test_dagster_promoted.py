"""A regression made on purpose: the promoted export stays, Dagster says which number is worse, and a
person goes forward and back."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from conftest import Values, write_images
from dagster_support import definitions_of, told, write_recipe
from process_support import forked_launches
from safetensors.torch import load_file

from assets.common import KINDS, Kind, asset_key
from diffsynth_dagster.cache.split import second_half
from diffsynth_dagster.config import TrainingConfig, read_recipe
from diffsynth_dagster.facts import digest_file
from diffsynth_dagster.promoted import Promoted, current_promoted, promoted_versions
from diffsynth_dagster.run.record import read_record
from diffsynth_dagster.run.up_to_date import why_train
from diffsynth_dagster.weights.hub import ModelHub

DIT = "diffusers/transformer/diffusion_pytorch_model.safetensors"


def event_of(done: dg.ExecuteInProcessResult) -> tuple[dict[str, Any], str]:
    """Metadata and data version of the promoted export."""
    (made,) = done.asset_materializations_for_node("tiny__promoted")
    facts = {name: value.value for name, value in made.metadata.items()}
    return facts, (made.tags or {})["dagster/data_version"]


def check_of(done: dg.ExecuteInProcessResult) -> dg.AssetCheckEvaluation:
    (found,) = (e for e in done.get_asset_check_evaluations() if e.check_name == "not_worse")
    return found


@pytest.fixture
def recipe(values: Values, tmp_path: Path) -> Callable[..., None]:
    """Writes the recipe, with samples held out."""
    data = write_images(tmp_path / "data", 10)
    given = {
        **values(validation_split=2, trainable_models="dit", learning_rate=1e-4),
        "dataset_base_path": str(data),
        "dataset_metadata_path": str(data / "metadata.csv"),
        "retries": 0,
    }
    return lambda **more: write_recipe(tmp_path / "recipes", "tiny", {**given, **more})


@pytest.fixture
def execute(tmp_path: Path) -> Iterator[Callable[..., dg.ExecuteInProcessResult]]:
    """Executes assets of the recipe, or `promoted` alone."""
    with forked_launches(), dg.instance_for_test(temp_dir=str(tmp_path)) as instance:

        def run(*kinds: Kind, **config: Any) -> dg.ExecuteInProcessResult:
            job = definitions_of(tmp_path / "recipes").resolve_job_def("train_tiny")
            return job.execute_in_process(
                config,
                instance=instance,
                raise_on_error=False,
                asset_selection=[asset_key("tiny", kind) for kind in kinds or ("promoted",)],
            )

        yield run


def refused_loss(ruined: dg.ExecuteInProcessResult, good: str, old: float) -> float:
    """The loss of a training that was refused, after a look at all that is said of it."""
    assert not ruined.success
    check, (facts, version) = check_of(ruined), event_of(ruined)
    assert (check.passed, check.blocking) == (False, True)
    assert check.metadata["compared"].value == "held_out_loss"
    assert check.metadata["promoted_before"].value == old
    new: Any = check.metadata["new"].value
    assert new > 1.05 * old
    assert f"its held-out loss is {new:.6g} (" in (check.description or "")
    assert f"and {old:.6g} the best of those promoted before" in (check.description or "")
    reason = told(ruined.all_events).reason
    assert "the new export is not promoted" in reason
    assert "materialize tiny/promoted with `force: true` in the run config" in reason
    assert (facts["what_happened"], facts["version"], version) == ("refused", good, good)
    return new


def test_a_regression_made_on_purpose(
    recipe: Callable[..., None],
    execute: Callable[..., dg.ExecuteInProcessResult],
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    recipe()
    facts, good = event_of(execute(*KINDS))
    assert (facts["what_happened"], facts["version"]) == ("promoted", good)
    dit = run / "exports" / "current" / DIT
    weights = dit.read_bytes()

    recipe(learning_rate=0.3)  # which ruins it
    new = refused_loss(execute(*KINDS[2:]), good, facts["held_out_loss"])
    # The one of before is in use still, though its training was moved.
    (older,) = (run / "older").iterdir()
    assert dit.read_bytes() == weights
    assert dit.samefile(older / "exports" / DIT)
    assert load_file(run / "exports" / "current" / "checkpoint.safetensors")
    assert len(promoted_versions(run)) == 1

    # Forward all the same, back, and no further by itself.
    done = execute(force=True)
    facts, bad = event_of(done)
    assert (facts["what_happened"], check_of(done).passed) == ("promoted", True)
    assert bad != good
    assert facts["held_out_loss"] == new
    facts, version = event_of(execute(version=good[:5]))
    assert (facts["what_happened"], version) == ("rolled back", good)
    assert dit.read_bytes() == weights
    done = execute()
    facts, version = event_of(done)
    assert (done.success, facts["what_happened"], version) == (True, "kept", good)
    assert f"version {bad} was rolled back from" in facts["why"]
    unknown = told(execute(version="zzz").all_events).reason
    assert f"the newest first: {good}, {bad}" in unknown
    current = current_promoted(run)
    assert current is not None
    assert current.version == good
    warm_start(recipe, execute, current, tmp_path)


def warm_start(
    recipe: Callable[..., None],
    execute: Callable[..., dg.ExecuteInProcessResult],
    current: Promoted,
    folder: Path,
) -> None:
    """The next one starts from it, and does so once: what it makes is no reason to train again."""
    recipe(seed=1, retrain={"cron": "0 3 * * *", "warm_start": True})
    done = execute(*KINDS[2:])
    assert event_of(done)[0]["what_happened"] == "promoted"
    record, settings = read_record(folder / "run"), second_half(config_of(folder))
    assert record is not None
    (checkpoint,) = current.checkpoint_files
    assert record.base["resume_from_checkpoint"] == digest_file(checkpoint)
    hub = ModelHub.from_environment()
    assert why_train(settings, hub, None, warm=True) is None
    why = "changed since: the weights of resume_from_checkpoint"
    assert why_train(settings, hub, None) == why
    recipe(seed=2, retrain={"cron": "0 3 * * *", "warm_start": True})
    changed = why_train(second_half(config_of(folder)), hub, None, warm=True)
    assert changed == "changed since: seed (was 1)"


def config_of(folder: Path) -> TrainingConfig:
    return read_recipe(folder / "recipes" / "tiny.yaml").config
