"""What is exported of a run folder, by Dagster and by the trainer alone: also of a training that was
stopped or failed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from conftest import Values, make_config, record_of, train, train_to_end, why_refused
from dagster._utils.test.data_versions import get_stale_status_resolver
from dagster_support import definitions_of, write_recipe

from diffsynth_dagster.errors import OutputError
from diffsynth_dagster.export import chosen_checkpoint, export_folder
from diffsynth_dagster.families import find_family
from diffsynth_dagster.run.record import read_record
from diffsynth_dagster.weights.header import read_metadata
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.lora import PROVENANCE_KEY
from resources import Launcher

FILE = Path("exports", "diffusers", "pytorch_lora_weights.safetensors")
BREAKING = ("--customized_optimizer", "test_run_record.BreaksInStep2", "--weight_decay", "0")


@pytest.fixture
def broken(values: Values, tmp_path: Path) -> Path:
    """The run folder of a training that crashed after the first of two steps, and their checkpoints."""
    with pytest.raises(ZeroDivisionError):
        train(values(save_steps=1), tmp_path / "run", *BREAKING, exports=True)
    assert not (tmp_path / "run" / "exports").exists()
    return tmp_path / "run"


def provenance(path: Path) -> dict[str, Any]:
    return json.loads(read_metadata(path)[PROVENANCE_KEY])


def refuse_to_launch(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("nothing may be launched")


def test_dagster_exports_an_unfinished_training_and_then_the_finished_one(
    values: Values,
    broken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Launcher, "run", refuse_to_launch)
    recipe = {**values(save_steps=1), "output_path": str(broken)}
    write_recipe(tmp_path / "recipes", "tiny", recipe)
    definitions = definitions_of(tmp_path / "recipes")
    key = dg.AssetKey(["tiny", "exports"])
    found: list[tuple[Any, str, list[str]]] = []
    with dg.DagsterInstance.ephemeral() as instance:
        for finished in (False, True):
            if finished:
                # Without the optimizer that crashed, it is another training.
                train_to_end(values(save_steps=1, resume="never"), broken)
            job = definitions.resolve_job_def("train_tiny")
            result = job.execute_in_process(instance=instance, asset_selection=[key])
            assert {e.check_name: e.passed for e in result.get_asset_check_evaluations()} == {
                "export_loads": True
            }
            (event,) = result.asset_materializations_for_node("tiny__exports")
            resolver = get_stale_status_resolver(instance, list(definitions.assets or []))
            causes = [cause.reason for cause in resolver.get_stale_causes(key)]
            version = (event.tags or {})["dagster/data_version"]
            found.append((event.metadata.get("unfinished"), version, causes))
    (unfinished, before, stale), (nothing, after, fresh) = found
    assert unfinished.value == "step 1 of 2"
    assert stale == ["has a new code version"]
    assert nothing is None
    assert fresh == []
    assert before != after
    assert "unfinished: its checkpoint of step 1 of 2 was exported" in capfd.readouterr().err
    assert "unfinished" not in provenance(broken / FILE)


def test_the_newest_whole_checkpoint_of_an_unfinished_training(
    values: Values, broken: Path
) -> None:
    config = make_config({**values(), "output_path": str(broken)})
    exported = export_folder(config, ModelHub.from_environment())
    assert exported.unfinished == "step 1 of 2"
    assert exported.problems == []
    said = provenance(broken / FILE)
    assert said["unfinished"] == "step 1 of 2"
    record, family = read_record(broken), find_family("qwen_image")
    assert record is not None
    # Killed while it wrote another one over it.
    names = {**record.checkpoints, "step-2.safetensors": "0"}
    killed = replace(record, checkpoints=names, newest=["step-2.safetensors"])
    chosen = chosen_checkpoint(config, killed, family)
    assert chosen.paths == [broken / "step-1.safetensors"]
    assert chosen.digest == said["checkpoint"] == record.chosen_digest
    with pytest.raises(OutputError, match="is missing or was changed"):
        chosen_checkpoint(config, replace(killed, finished=True), family)
    with pytest.raises(OutputError, match="ended before its first checkpoint"):
        chosen_checkpoint(config, replace(record, checkpoints={}, newest=[]), family)
    with pytest.raises(OutputError, match="holds no training"):
        export_folder(
            config.model_copy(update={"output_path": str(broken / "none")}),
            ModelHub.from_environment(),
        )
    assert not (broken / "none").exists()


def test_the_recipe_says_which_checkpoint_is_exported(values: Values, tmp_path: Path) -> None:
    held_out = {"validation_split": 2, "validation_steps": 1, "keep_best": True}
    given = values(save_steps=1, num_epochs=2, **held_out)
    run = train_to_end(given, tmp_path / "run")
    record = record_of(run)
    steps = {name: provenance(run / name)["step"] for name in record.checkpoints}
    best, last = steps[record.best[0]], max(steps.values())
    for asked, step in {"best": best, "last": last, "1": 1, None: best}.items():
        config = make_config({**given, "output_path": str(run), "export_checkpoint": asked})
        export_folder(config, ModelHub.from_environment())
        assert provenance(run / FILE)["checkpoint"] in {
            digest for name, digest in record.checkpoints.items() if steps[name] == step
        }
    # What is no longer asked for goes: it may be of another checkpoint.
    config = config.model_copy(update={"export_formats": ["comfyui"]})
    export_folder(config, ModelHub.from_environment())
    assert not (run / FILE).exists()
    assert (run / "exports" / "comfyui" / FILE.name).exists()
    for asked, words in {"99": "no checkpoint of step 99.*: 1, 2", "best": "no best"}.items():
        left = [name for name in record.checkpoints if name not in record.best]
        kept = {name: record.checkpoints[name] for name in left}
        config = make_config({**given, "output_path": str(run), "export_checkpoint": asked})
        less = replace(record, best=[], checkpoints=kept)
        with pytest.raises(OutputError, match=f"(?s){words}"):
            chosen_checkpoint(config, less, find_family("qwen_image"))


def test_an_export_that_fails_loses_no_training(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command goes on to the export alone."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "exports").write_text("in the way")
    error = why_refused(values(), run, exports=True)
    assert f"the training is finished and its checkpoints are whole, in {run}; " in error
    assert "give the same command again: it exports them" in error
    assert "Traceback" not in error
    record = record_of(run)
    assert record.finished
    (run / "exports").unlink()
    train_to_end(values(), run, exports=True)
    assert "going on after step 2" in capsys.readouterr().out
    assert provenance(run / FILE)["checkpoint"] == record.chosen_digest
