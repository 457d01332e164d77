"""Real runs of a recipe on a tiny model, in this process; the training in its own."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
from conftest import lora_values, record_of, write_images
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.loader import LoadingContextForTest
from dagster_support import Place, definitions_of, failure_of
from process_support import forked_launches

from assets.common import KINDS, Kind, asset_key
from diffsynth_dagster.weights.hub import ModelHub
from resources import Launcher

MAX_EVENT = 100_000
DATA = "dagster/data_version"


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_qwen: Path, pictures: Path
) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("place")
    values: dict[str, Any] = {
        **lora_values(tiny_qwen, pictures, folder / "cache"),
        "description": "Two steps on eight pictures.",
        "family": None,  # told from the files
        "height": 32,
        "width": 32,
        "sample_prompts": ["a picture"],
        "sample_num_inference_steps": 1,
    }
    with forked_launches(), dg.instance_for_test(temp_dir=str(folder)) as instance:
        yield Place(folder, values, instance)


def metadata_of(result: dg.ExecuteInProcessResult, kind: str, name: str) -> dict[str, Any]:
    (found,) = result.asset_materializations_for_node(f"{name}__{kind}")
    return dict(found.metadata)


def checks_of(result: dg.ExecuteInProcessResult) -> dict[str, bool]:
    return {e.check_name: e.passed for e in result.get_asset_check_evaluations()}


def table_in(data: Path) -> dict[str, str]:
    return {"dataset_base_path": str(data), "dataset_metadata_path": str(data / "metadata.csv")}


def why_stale(place: Place, kind: Kind, name: str) -> list[str]:
    """Why Dagster shows an asset as stale."""
    graph = definitions_of(place.folder / "recipes").resolve_asset_graph()
    context = LoadingContextForTest(place.instance)
    resolver = CachingStaleStatusResolver(place.instance, graph, context)
    return [cause.reason for cause in resolver.get_stale_causes(asset_key(name, kind))]


def tags_of(result: dg.ExecuteInProcessResult, kind: Kind, name: str) -> Mapping[str, str]:
    (found,) = result.asset_materializations_for_node(f"{name}__{kind}")
    return found.tags or {}


@pytest.fixture(scope="module")
def first(place: Place) -> dg.ExecuteInProcessResult:
    place.recipe("tiny")
    return place.run("tiny")


@pytest.fixture(scope="module")
def second(place: Place, first: dg.ExecuteInProcessResult) -> dg.ExecuteInProcessResult:
    assert first.success
    return place.run("tiny")


def test_every_asset_says_what_a_person_wants_to_see(
    place: Place, first: dg.ExecuteInProcessResult
) -> None:
    assert first.success
    assert checks_of(first) == {
        "every_row_valid": True,
        "latents_complete_and_finite": True,
        "loss_finite_and_parameters_changed": True,
        "export_loads": True,
        "not_worse": True,
    }
    weights = [
        e for e in first.get_asset_materialization_events() if e.asset_key.path[0] == "weights"
    ]
    assert len(weights) == 4
    facts = {str(e.materialization.metadata["component"].value) for e in weights}
    assert facts == {
        "dit of qwen_image",
        "text_encoder of qwen_image",
        # One architecture with another scale of its latents: the tensors are the same.
        "vae of qwen_image, vae of wanvideo",
        "tokenizer",
    }
    table = metadata_of(first, "metadata", "tiny")
    names = ("dagster/row_count", "status/ok", "duplicates")
    assert [table[name].value for name in names] == [8, 8, 0]
    assert "picture number" in table["rows"].value
    latents = metadata_of(first, "latents", "tiny")
    assert (latents["misses/image"].value, latents["misses/prompt"].value) == (8, 8)
    assert latents["hits/image"].value == 0
    assert latents["store_bytes"].value > 0
    training = metadata_of(first, "checkpoints", "tiny")
    assert training["trained_in_this_run"].value is True
    assert training["trained_because"].value == "there is no training in the run folder"
    assert "overrides" not in training
    require_result_first(training)
    exports = metadata_of(first, "exports", "tiny")
    (file,) = exports["files"].records
    assert file.data["format"] == "diffusers"
    assert Path(file.data["file"]).is_file()
    promoted = metadata_of(first, "promoted", "tiny")
    assert promoted["what_happened"].value == "promoted"
    assert Path(promoted["checkpoint"].value).is_file()
    for facts, names in ((table, ["contact_sheet"]), (training, ["loss_curve", "samples"])):
        for name in names:
            assert facts[name].value.startswith("![](data:image/")
            assert len(facts[name].value) < MAX_EVENT


def numbers_of(facts: Mapping[str, Any]) -> set[str]:
    """The metadata that Dagster plots."""
    kinds = (dg.FloatMetadataValue, dg.IntMetadataValue)
    return {name for name, value in facts.items() if isinstance(value, kinds)}


def require_result_first(facts: Mapping[str, Any]) -> None:
    """What came of a training, then why and how it was made, then numbers, and digests last."""
    order = [
        *("result", "trained_because", "trained_in_this_run", "trained", "base", "learning_rate"),
        *("steps", "trained_samples", "loss", "loss_curve", "samples", "devices", "run_folder"),
        "checkpoints",
    ]
    assert [name for name in facts if name in order] == order
    assert list(facts)[-1] == "checkpoints"
    # Dagster shows a picture open only in Markdown of less than 1000 characters.
    assert len(facts["result"].value) < 1000
    assert numbers_of(facts) == {"loss"}
    assert len(str(facts["loss"].value)) <= len("0.0001234")
    assert facts["trained"].value == "LoRA of rank 4, alpha 4, of dit"
    assert facts["base"].value.startswith("qwen_image: ")
    assert facts["learning_rate"].value == "0.001, constant"
    assert facts["steps"].value == "2 in 1 epoch, of 4 samples"
    assert facts["trained_samples"].value == "8"
    assert facts["devices"].value


def test_progress_becomes_observations(place: Place, first: dg.ExecuteInProcessResult) -> None:
    records = place.instance.fetch_observations(dg.AssetKey(["tiny", "checkpoints"]), limit=10)
    seen = [r.asset_observation.metadata for r in records.records if r.asset_observation]
    assert seen
    assert seen[0]["step"].value == "2 of 2"
    assert all(numbers_of(each) <= {"loss", "held_out_loss"} for each in seen)
    assert next(iter(seen[0])) == "loss"
    assert float(str(seen[0]["samples_per_second"].value)) > 0
    pictured = {m["step"].value: m["samples"].value for m in seen if "samples" in m}
    assert list(pictured) == ["2 of 2", "0"]
    for value in pictured.values():
        assert str(value).startswith("![](data:image/")
        assert len(str(value)) < MAX_EVENT
    assert first.success


def test_second_run_neither_encodes_nor_trains(
    place: Place, first: dg.ExecuteInProcessResult, second: dg.ExecuteInProcessResult
) -> None:
    assert second.success
    latents = metadata_of(second, "latents", "tiny")
    assert latents["misses/image"].value == latents["misses/prompt"].value == 0
    training = metadata_of(second, "checkpoints", "tiny")
    assert training["trained_in_this_run"].value is False
    assert "trained_because" not in training
    assert training["steps"].value == "2 in 1 epoch, of 4 samples"
    assert training["result"] == metadata_of(first, "checkpoints", "tiny")["result"]
    made = second.get_asset_materialization_events()
    assert len(made) == 9
    assert sum("unchanged" in e.materialization.metadata for e in made) == 8
    pictures = ("contact_sheet", "loss_curve", "samples")
    for kind in KINDS:
        shown = [metadata_of(result, kind, "tiny") for result in (first, second)]
        assert all(shown[0][name] == shown[1][name] for name in pictures if name in shown[0])
    assert metadata_of(second, "promoted", "tiny")["what_happened"].value == "unchanged"
    assert checks_of(second) == checks_of(first)
    before, after = (
        {
            e.asset_key: e.materialization.tags["dagster/data_version"]  # pyright: ignore
            for e in result.get_asset_materialization_events()
        }
        for result in (first, second)
    )
    assert before == after


def test_run_config_retrains_with_other_parameters(
    place: Place, second: dg.ExecuteInProcessResult
) -> None:
    """Parameters of the run config reach the training; the recipe's own run stays as it was, and Dagster
    shows that the newest is another one."""
    assert second.success
    assert not [cause for kind in KINDS for cause in why_stale(place, kind, "tiny")]
    folder = str(place.folder / "other")
    parameters = {"num_epochs": 2, "output_path": folder, "sample_prompts": []}
    result = place.run("tiny", run_config={**parameters, "retrain": True, "num_processes": 1})
    assert result.success
    facts = metadata_of(result, "checkpoints", "tiny")
    assert facts["steps"].value == "4 in 2 epochs, of 4 samples"
    assert facts["trained_because"].value == "retrain was asked for"
    assert facts["overrides"].value == {**parameters, "num_processes": 1}
    assert why_stale(place, "checkpoints", "tiny") == ["has a new code version"]
    record = record_of(Path(folder))
    assert record.steps == 4
    before = record_of(place.folder / "tiny")
    assert before.steps == 2


def unchanged(result: dg.ExecuteInProcessResult, name: str) -> list[Kind]:
    return [k for k in KINDS[:-1] if "unchanged" in metadata_of(result, k, name)]


def test_only_what_is_not_as_it_was_is_made_again(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    """And nothing is shown as stale after it. Losses and pictures that are not as the training left them are
    named, not shown, and no reason to train again."""
    data = write_images(place.folder / "own", 3)
    place.recipe("edited", **table_in(data))
    assert place.run("edited").success
    place.recipe("edited", **table_in(data), export_formats=["comfyui"])
    exported = place.run("edited")
    assert unchanged(exported, "edited") == ["metadata", "latents", "checkpoints"]
    assert not [cause for kind in KINDS for cause in why_stale(place, kind, "edited")]
    run = place.folder / "edited"
    file = next((run / "exports" / "comfyui").rglob("*.safetensors"))
    damaged = file.read_bytes()[:-1]
    file.unlink()  # what is promoted has a second name of it
    file.write_bytes(damaged)
    looked_at = [run / "metrics.csv", *sorted((run / "samples").iterdir())]
    for path in looked_at:
        path.write_bytes(bytes(8) + path.read_bytes()[8:])
    capfd.readouterr()
    mended = place.run("edited")
    assert mended.success
    assert unchanged(mended, "edited") == ["metadata", "latents"]
    facts = metadata_of(mended, "checkpoints", "edited")
    assert facts["trained_in_this_run"].value is False
    assert not {"loss_curve", "samples"} & facts.keys()
    said = capfd.readouterr().err
    assert all(str(path) in said for path in looked_at)
    tags = [tags_of(result, "exports", "edited") for result in (exported, mended)]
    assert tags[0][DATA] == tags[1][DATA]


def test_a_recipe_for_each_half(place: Place) -> None:
    """The second takes the size over from the first, also where the assets ask what has changed."""
    plain = {"sample_prompts": None, "sample_num_inference_steps": None}
    first = {"task": "sft:data_process", "height": 16, "width": 16}
    place.recipe("first_half", **plain, **first)
    second = {"task": "sft:train", "height": None, "width": None, "dataset_metadata_path": None}
    encoded = str(place.folder / "first_half")
    place.recipe("second_half", **plain, **second, dataset_base_path=encoded)
    first_half = place.run("first_half")
    assert first_half.success
    made = tags_of(first_half, "latents", "first_half")[DATA]
    for trains in (True, False):
        result = place.run("second_half")
        assert result.success
        assert not result.asset_materializations_for_node("first_half__latents")
        taken = tags_of(result, "checkpoints", "second_half")
        assert taken["dagster/input_data_version/first_half/latents"] == made
        metadata = metadata_of(result, "checkpoints", "second_half")
        assert metadata["trained_in_this_run"].value is trains


def refuse_to_launch(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("nothing may be launched")


def test_ten_damaged_files_of_two_hundred(place: Place, tmp_path: Path) -> None:
    """They stop the run before a model file is read, and are shown, as is a file that is not there; if
    allowed, 190 are trained."""
    data = write_images(tmp_path / "data", 200)
    damaged = range(7, 200, 20)
    for index in damaged:
        path = data / f"{index}.png"
        path.write_bytes(path.read_bytes()[: 100 + index])
    with (data / "metadata.csv").open("a", encoding="utf-8") as file:
        file.write('none.png,"not | there"\n')
    table = table_in(data)
    place.recipe("damaged", **table)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launcher, "run", refuse_to_launch)
        result = place.run("damaged")
    assert not result.success
    assert checks_of(result) == {"every_row_valid": False}
    materialized = [e.asset_key.path[-1] for e in result.all_events if e.is_step_materialization]
    assert materialized[0] == "metadata"
    assert not {"latents", "checkpoints", "exports"} & set(materialized)
    facts = metadata_of(result, "metadata", "damaged")
    counts = {key: facts[f"status/{key}"].value for key in ("ok", "unreadable", "file_missing")}
    assert counts == {"ok": 190, "unreadable": 10, "file_missing": 1}
    assert facts["rows"].value.count("not a readable image") == 10
    assert r"not \| there" in facts["rows"].value
    assert facts["contact_sheet"].value.startswith("![")
    rejected = pl.read_csv(place.folder / "damaged" / "rejected.csv")
    assert rejected["row"].to_list() == [*(index + 1 for index in damaged), 201]
    (check,) = result.get_asset_check_evaluations()
    assert "190 of 201 rows are usable; 11 are rejected: " in (check.description or "")

    short = {"batch_size": 32, "height": 16, "width": 16, "sample_prompts": []}
    place.recipe("spared", **table, **short, max_rejected_fraction=0.1)
    result = place.run("spared")
    assert result.success
    assert record_of(place.folder / "spared").samples == 190


def test_allowed_rejects_pass_the_check(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Launcher, "run", refuse_to_launch)
    data = write_images(tmp_path / "data", 3)
    (data / "1.png").unlink()
    place.recipe("allowed", **table_in(data), max_rejected_fraction=0.5, height=64, width=64)
    result = place.run("allowed", asset_selection=[dg.AssetKey(["allowed", "metadata"])])
    assert result.success
    assert checks_of(result) == {"every_row_valid": True}
    (check,) = result.get_asset_check_evaluations()
    assert "\nwarning: 2 rows, the first is 1, have pictures or clips that are smaller" in str(
        check.description
    )


@pytest.mark.parametrize(
    ("overrides", "node", "words"),
    [
        ({"dataset_metadata_path": "none.csv"}, "bad__metadata", "metadata file does not exist"),
        ({"model_paths": ["none.safetensors"]}, "weights__none", "the model file does not exist"),
        ({"output_path": "/dev/null/run"}, "bad__metadata", "cannot be written"),
    ],
)
def test_mistake_is_one_message_without_retry(
    place: Place, monkeypatch: pytest.MonkeyPatch, overrides: dict[str, Any], node: str, words: str
) -> None:
    monkeypatch.setattr(Launcher, "run", refuse_to_launch)
    place.recipe("bad", **overrides)
    result = place.run("bad")
    assert not result.success
    assert words in failure_of(result, node)
    assert not [e for e in result.all_events if e.event_type_value == "STEP_UP_FOR_RETRY"]


def test_download_is_tried_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffsynth_dagster.errors import DownloadError

    tries: list[object] = []

    def unreachable(hub: ModelHub, entry: object) -> list[Path]:
        if not hub.skip_download:
            tries.append(entry)
        raise DownloadError("the hub did not answer")

    monkeypatch.setattr(ModelHub, "files", unreachable)
    monkeypatch.setattr("assets.weights._RETRIES", 2)
    monkeypatch.setattr("assets.weights.RETRY_DELAY_S", 0.0)
    place.recipe("away", model_paths=None, model_id_with_origin_paths=["a/b:c.safetensors"])
    key = dg.AssetKey(["weights", "a", "b", "c"])
    result = place.run("away", asset_selection=[key])
    assert not result.success
    assert len(tries) == 3
    assert failure_of(result, "weights__a__b__c") == "the hub did not answer"


def test_manifest_is_checked_against_the_store(place: Place, first: Any) -> None:
    """A key that is gone from the index, or not finite, fails the blocking check."""
    from assets.latents import _describe
    from diffsynth_dagster.cache.contents import look_into
    from diffsynth_dagster.cache.manifest import Manifest, read_manifest
    from diffsynth_dagster.data.table.checked_table import read_checked

    manifest, table = (read(place.folder / "tiny") for read in (read_manifest, read_checked))

    def check_of(frame: pl.DataFrame, **notes: Any) -> dg.AssetCheckResult:
        path = place.folder / "other.parquet"
        frame.write_parquet(path)
        other: Manifest = replace(manifest, path=path, **notes)
        return _describe(other, [look_into(other, table)])[1]

    assert check_of(manifest.frame).passed
    check = check_of(manifest.frame.with_columns(pl.col("key:image") + "x"))
    assert not check.passed
    assert check.metadata["missing_keys"].value == 8
    assert not check_of(manifest.frame.head(3)).passed
