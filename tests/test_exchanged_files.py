"""Model files and pictures that become others while they are used, and look the same."""

import os
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Values, make_config, model_files, train_to_end, write_images
from safetensors.torch import load_file

from diffsynth_dagster.cache.encoded_for import require_planned_weights
from diffsynth_dagster.cache.manifest import read_manifest
from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.data.samples import files_of, load_files
from diffsynth_dagster.data.table.validate import validate
from diffsynth_dagster.errors import MetadataError, WeightsError
from diffsynth_dagster.facts import FactCache, digest_file
from diffsynth_dagster.run.start import start_record
from diffsynth_dagster.training.build import build_step
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.models import Models, component_digest
from diffsynth_dagster.weights.resolved import ResolvedModel

LOCAL = ModelHub(Path("models"), skip_download=True)
CPU = torch.device("cpu")
REFUSED = "the model file was replaced or changed while it was in use"


def other(content: bytes) -> bytes:
    """As long, and its last bytes are others: of a model, weights; of JSON, the order of blanks."""
    if content.rstrip().endswith(b"}"):
        return content.rstrip()[:-1] + b" " * (len(content) - len(content.rstrip())) + b"}"
    return content[:-4] + bytes(reversed(content[-4:]))


def written_over(path: Path, content: bytes) -> None:
    with path.open("r+b") as file:
        file.write(content)


def replaced(path: Path, content: bytes) -> None:
    staged = path.with_suffix(".new")
    staged.write_bytes(content)
    staged.replace(path)


def exchange(path: Path, put: Callable[[Path, bytes], None] = replaced) -> None:
    """Let a file have another content, of the same length and the same time of modification."""
    before = path.stat()
    content = path.read_bytes()
    changed = other(content)
    assert changed != content
    put(path, changed)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert path.stat().st_mtime_ns == before.st_mtime_ns


@pytest.fixture
def model(tiny_qwen: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_qwen, tmp_path / "model"))


@pytest.fixture
def config(values: Values, model: Path) -> TrainingConfig:
    tokenizer = str(model / "tokenizer")
    return make_config(values(model_paths=model_files(model), tokenizer_path=tokenizer))


@pytest.fixture
def facts(tmp_path: Path) -> Any:
    with closing(FactCache(tmp_path / "facts.sqlite")) as cache:
        yield cache


def models_of(found: ResolvedModel) -> Models:
    return Models(found, CPU, torch.float32, on_cpu_first=False)


@pytest.mark.parametrize("put", [written_over, replaced])
@pytest.mark.parametrize("name", ["dit", "text_encoder", "vae"])
def test_what_is_loaded_is_what_was_digested(
    config: TrainingConfig, facts: FactCache, name: str, put: Callable[[Path, bytes], None]
) -> None:
    found = find_model(config, LOCAL)
    component_digest(found, name, facts)
    file = found.components[name].files[0]
    exchange(file, put)
    for use in (lambda: models_of(found).get([name]), lambda: component_digest(found, name, facts)):
        with pytest.raises(WeightsError, match=REFUSED) as error:
            use()
        assert error.value.where == str(file)
        assert error.value.do is not None
    # Another run goes by the new content, also where the cache of facts knew the old one.
    later = find_model(config, LOCAL)
    component_digest(later, name, facts)
    assert models_of(later).get([name])
    assert facts.digest(file) == digest_file(file)


def test_a_file_that_was_only_touched_or_restored_is_the_same(
    config: TrainingConfig, facts: FactCache
) -> None:
    found = find_model(config, LOCAL)
    component_digest(found, "vae", facts)
    file = found.components["vae"].files[0]
    content = file.read_bytes()
    os.utime(file)
    file.chmod(0o600)
    assert models_of(found).get(["vae"])
    exchange(file)
    replaced(file, content)
    assert models_of(found).get(["vae"])
    file.unlink()
    with pytest.raises(WeightsError, match=REFUSED):
        models_of(found).get(["vae"])


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("vae", "vae/config.json"),
        ("vae", "vae/diffusion_pytorch_model.safetensors"),
        ("tokenizer", "tokenizer/added_tokens.json"),
    ],
)
def test_what_is_used_is_what_was_found(
    config: TrainingConfig, facts: FactCache, model: Path, name: str, file: str
) -> None:
    """The settings and shapes of a model are read before it is digested; a tokenizer gets no files."""
    found = find_model(config, LOCAL)
    if name == "tokenizer":
        component_digest(found, name, facts)
        (model / file).write_text("{}")
    else:
        exchange(model / file)
    with pytest.raises(WeightsError, match=REFUSED) as error:
        models_of(found).get([name]) if name == "tokenizer" else component_digest(
            found, name, facts
        )
    assert error.value.where == str(model / file)


def test_weights_on_the_cpu_do_not_follow_their_file(
    config: TrainingConfig, facts: FactCache
) -> None:
    found = find_model(config, LOCAL)
    vae = models_of(found).get(["vae"])["vae"]
    before = {name: p.clone() for name, p in vae.state_dict().items()}
    file = found.components["vae"].files[0]
    written_over(file, file.read_bytes()[:-4000] + b"\x11" * 4000)
    assert any(not torch.equal(before[n], t) for n, t in load_file(file).items())
    assert all(torch.equal(before[n], t) for n, t in vae.state_dict().items())


def test_files_to_start_from_are_those_of_the_record(
    values: Values, config: TrainingConfig, facts: FactCache, model: Path, tmp_path: Path
) -> None:
    run = train_to_end(values(), tmp_path / "run")
    manifest, lora = read_manifest(run), run / "epoch-0.safetensors"
    whole = tmp_path / "whole.safetensors"
    shutil.copy(model_files(model)[0], whole)
    full = {"trainable_models": ("dit",), "lora_base_model": ()}
    for changes, file in (
        ({"lora_checkpoint": str(lora)}, lora),
        ({"preset_lora_path": str(lora)}, lora),
        ({"resume_from_checkpoint": str(whole), **full}, whole),
    ):
        given = config.model_copy(update=changes)
        found = find_model(given, LOCAL)
        record = start_record(given, found, manifest, facts)
        assert (set(changes) - {*full, "preset_lora_path"}) <= record.base.keys()
        build_step(given, models_of(found), torch.float32)
        exchange(file)
        with pytest.raises(WeightsError, match=REFUSED) as error:
            build_step(given, models_of(found), torch.float32)
        assert error.value.where == str(file)

    # Another machine of a training has other files than the one that planned.
    planned = replace(manifest, weights={"vae": "0" * 64})
    require_planned_weights(found, manifest, facts)
    with pytest.raises(WeightsError, match="the files of 'vae' are not those that the samples"):
        require_planned_weights(found, planned, facts)


def test_verified_content_is_that_of_weights_too(config: TrainingConfig, facts: FactCache) -> None:
    file = find_model(config, LOCAL).components["vae"].files[0].absolute()
    facts.look_up("digest", [file], lambda path: {"digest": "wrong"})
    believed = component_digest(find_model(config, LOCAL), "vae", facts)
    verifies = config.model_copy(update={"verify_content": True})
    verified = component_digest(find_model(verifies, LOCAL), "vae", facts)
    assert verified != believed
    assert facts.digest(file) == digest_file(file)
    assert component_digest(find_model(config, LOCAL), "vae", facts) == verified


def test_a_picture_that_looks_the_same_is_noticed(
    values: Values, facts: FactCache, tmp_path: Path
) -> None:
    data = write_images(tmp_path / "data", 2)
    table = str(data / "metadata.csv")
    config = make_config(values(dataset_base_path=str(data), dataset_metadata_path=table))
    columns = find_model(config, LOCAL).family.columns
    row = validate(config, columns, facts).frame.row(0, named=True)
    (item,) = (i for i in columns.inputs if i.is_file and i.column == "image")
    files, picture = files_of(row, item), data / "0.png"
    # A copy on another disk has other marks and the same content.
    shutil.copy2(picture, tmp_path / "copy.png")
    (tmp_path / "copy.png").replace(picture)
    assert load_files(files, item, 1).shape == (3, 32, 32)
    exchange(picture)
    with pytest.raises(MetadataError, match="no longer the one that was checked"):
        load_files(files, item, 1)
    again = validate(config, columns, facts).frame.row(0, named=True)
    assert (again["image:digest"], again["status"]) != (row["image:digest"], row["status"])
