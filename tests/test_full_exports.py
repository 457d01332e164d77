"""Modules that are trained in full: in shards, and in the names of the authors' files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Values, make_config, record_of, train_to_end
from diffusers import QwenImageTransformer2DModel, WanTransformer3DModel
from families.stable_diffusion.cases import CASES as SD
from families.wanvideo.cases import CASES, rows, write
from safetensors.torch import load_file
from test_families import Place

from diffsynth_dagster.errors import WeightsError
from diffsynth_dagster.export import (
    Exported,
    chosen_checkpoint,
    export_run,
    full,
    how_to_load,
    verify_export,
)
from diffsynth_dagster.export.card import write_card
from diffsynth_dagster.families.contract import Tensors
from diffsynth_dagster.own_names import is_own
from diffsynth_dagster.run.record import read_record
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.lora import PROVENANCE_KEY
from diffsynth_dagster.weights.resolved import ResolvedModel

HUB = ModelHub(Path(), skip_download=True)
SHARD = 200_000
STEM = "diffusion_pytorch_model"


def exports_of(given: dict[str, Any], run: Path) -> tuple[list[Exported], ResolvedModel]:
    config = make_config({**given, "output_path": str(run)})
    record, found = read_record(run), find_model(config, HUB)
    assert record is not None
    return export_run(config, record, found), found


def weights_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "config.json")


def assert_equal(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_shards_load_with_from_pretrained(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = values(trainable_models=["dit"], learning_rate=1e-3)
    run = train_to_end(given, tmp_path / "run")
    trained = load_file(run / "epoch-0.safetensors")
    (whole,), _ = exports_of(given, run)
    folder = whole.path.parent
    assert weights_in(folder) == [f"{STEM}.safetensors"]

    monkeypatch.setattr(full, "MAX_SHARD", SHARD)
    (exported,), found = exports_of(given, run)
    verify_export(exported, found)
    shards = sorted(folder.glob("*.safetensors"))
    count = len(shards)
    assert count > 2
    numbered = [f"{STEM}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    assert weights_in(folder) == [*numbered, f"{STEM}.safetensors.index.json"]
    assert all(is_own(path.relative_to(run).as_posix()) for path in folder.iterdir())
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= SHARD
    index = json.loads(exported.path.read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in trained.values())
    assert index["weight_map"].keys() == trained.keys()
    assert (exported.tensors, exported.kind) == (len(trained), "full")
    assert exported.bytes == sum(p.stat().st_size for p in [*shards, exported.path])
    loaded: Any = QwenImageTransformer2DModel.from_pretrained(folder)
    assert_equal(loaded.state_dict(), trained)
    assert how_to_load(exported, found.family).endswith(f'.from_pretrained("{folder}")')
    (again,), _ = exports_of(given, run)
    assert again == exported

    # Fewer shards: none of the others stays.
    monkeypatch.setattr(full, "MAX_SHARD", 3 * SHARD)
    exports_of(given, run)
    fewer = len(list(folder.glob("*.safetensors")))
    assert 1 < fewer < count
    assert len(weights_in(folder)) == fewer + 1
    monkeypatch.undo()
    (single,), _ = exports_of(given, run)
    assert weights_in(folder) == [f"{STEM}.safetensors"]
    assert single == whole


def test_a_text_encoder_in_shards(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the LoRA of another module. Published files have other names than transformers' module."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    monkeypatch.setattr(full, "MAX_SHARD", SHARD)
    given = {**values(), "trainable_models": ["text_encoder"]}
    run = train_to_end(given, tmp_path / "run")
    (lora, exported, published), found = exports_of(given, run)
    assert (lora.kind, exported.format, published.format) == ("lora", "diffusers", "authors")
    for item in (lora, exported, published):
        verify_export(item, found)
    assert exported.path.name == "model.safetensors.index.json"
    loaded: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(exported.path.parent)
    start = "pipe.text_encoder."
    saved = load_file(run / "epoch-0.safetensors").items()
    trained = {n.removeprefix(start): t for n, t in saved if n.startswith(start)}
    assert_equal(load_file(published.path), trained)
    assert_equal(
        loaded.state_dict(),
        found.components["text_encoder"].component.construction.convert(trained),
    )


def test_what_is_missing_or_damaged_is_refused(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full, "MAX_SHARD", SHARD)
    given = values(trainable_models=["dit"])
    run = train_to_end(given, tmp_path / "run")
    (exported,), found = exports_of(given, run)
    first, second, *_ = sorted(exported.path.parent.glob("*.safetensors"))

    def refused(path: Path, content: bytes | None, why: str) -> None:
        before = path.read_bytes()
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(WeightsError, match=why):
            verify_export(exported, found)
        path.write_bytes(before)
        verify_export(exported, found)

    whole = first.read_bytes()
    refused(first, None, f"{first.name} is missing")
    refused(first, whole[:-1], "was changed since it was written")
    refused(first, whole[:-1] + bytes([whole[-1] ^ 1]), "was changed since it was written")
    refused(first, second.read_bytes(), "was changed since it was written")
    refused(exported.path, b"{}", "its index cannot be read")
    # Also what says that these are the bytes that were written.
    index = json.loads(exported.path.read_text())
    name = next(n for n, file in index["weight_map"].items() if file == first.name)
    index["weight_map"][name] = second.name
    exported.path.write_text(json.dumps(index))
    files = [exported.path, *sorted(exported.path.parent.glob("*.safetensors"))]
    other = replace(exported, digest=full.digest_of_files(files))
    with pytest.raises(WeightsError, match="index names other tensors"):
        verify_export(other, found)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan")
    write(folder / "model")
    rows(folder / "data")
    return folder


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_what_came_from_the_authors_files_is_written_in_their_names_too(
    wan: Path, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full, "MAX_SHARD", SHARD)
    case = next(c for c in CASES if c.name == "wan_t2v")
    given: dict[str, Any] = {
        "family": "wanvideo",
        "dataset_base_path": str(wan / "data"),
        "dataset_metadata_path": str(next((wan / "data").glob("*.csv"))),
        "trainable_models": "dit",
        "learning_rate": 1e-3,
        "cache_path": str(wan / "cache"),
        **case.models(wan / "model", layout),
        **{n: v for n, v in case.parameters.items() if not n.startswith("lora_")},
    }
    run = train_to_end(given, tmp_path / "run")
    exported, found = exports_of(given, run)
    for item in exported:
        verify_export(item, found)
    source = found.components["dit"]
    whole = exported[0]
    loaded: Any = WanTransformer3DModel.from_pretrained(whole.path.parent)
    if layout == "diffusers":
        assert [item.format for item in exported] == ["diffusers"]
        assert not (run / "exports" / "authors").exists()
        return
    assert [item.format for item in exported] == ["diffusers", "authors"]
    theirs = exported[1]
    (file,) = source.files
    assert theirs.path == run / "exports" / "authors" / "transformer" / f"{file.stem}.safetensors"
    assert is_own(theirs.path.relative_to(run).as_posix())
    written, before = load_file(theirs.path), load_file(file)
    assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in before.items()}
    assert any(not torch.equal(written[n], before[n].float()) for n in before)
    assert_equal(source.component.construction.convert(written), loaded.state_dict())
    assert_equal(written, load_file(run / "epoch-0.safetensors"))
    assert how_to_load(theirs, found.family).startswith(f"# {theirs.path} has the authors' names")

    record = record_of(run)
    config = make_config({**given, "output_path": str(run)})
    chosen = chosen_checkpoint(config, record, found.family)
    card = write_card(config, record, found, chosen, exported).text
    file_name = f"authors/transformer/{file.stem}.safetensors"
    assert f"\nComfyUI: copy `{file_name}` into `models/diffusion_models`.\n" in card
    assert card.count("ComfyUI:") == 1

    # The files are the model of another training.
    again = {**given, "model_paths": [str(theirs.path), *given["model_paths"][1:]]}
    other = find_model(make_config({**again, "output_path": str(tmp_path / "other")}), HUB)
    assert other.components["dit"].shapes == source.shapes
    # What was written is compared with the export beside it.
    content = full.read_tensors([theirs.path])
    next(iter(content.values())).view(-1)[0] += 1
    full.write_described(theirs.path, content, {PROVENANCE_KEY: "{}"})
    wrong = replace(theirs, digest=full.digest_of_files([theirs.path]))
    with pytest.raises(WeightsError, match="converted, it is another model"):
        verify_export(wrong, found)


def test_what_came_from_a_whole_checkpoint_is_a_file_of_its_own(tmp_path: Path) -> None:
    case = next(c for c in SD if c.name == "sd15")
    case.write(tmp_path / "model")
    place = Place(case, tmp_path / "model", case.rows(tmp_path / "data"), tmp_path)
    given = place.values("original", lora_base_model=[], trainable_models=["unet", "text_encoder"])
    given["remove_prefix_in_ckpt"] = ""
    for name in ("lora_target_modules", "lora_rank", "align_to_opensource_format"):
        given.pop(name)
    run = train_to_end(given, tmp_path / "run")
    exported, found = exports_of(given, run)
    for item in exported:
        verify_export(item, found)
    made = {(item.format, item.components[0]): item for item in exported}
    for name in ("unet", "text_encoder"):
        source = found.components[name]
        (whole,) = source.files
        ours, theirs = made["diffusers", name], made["authors", name]
        assert theirs.path == run / "exports" / "authors" / name / f"{name}.safetensors"
        written = load_file(theirs.path)
        assert written.keys() <= {n.removeprefix(source.start) for n in load_file(whole)}
        assert_equal(source.component.construction.convert(written), load_file(ours.path))
