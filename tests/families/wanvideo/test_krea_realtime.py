"""krea-realtime-video: a Wan whose file has `model.` before all names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_config, train_to_end
from families.wanvideo.cases import CASES, rows, write
from safetensors.torch import load_file, save_file

from diffsynth_dagster.export import export_run, verify_export
from diffsynth_dagster.run.record import read_record
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.load import load_component

HUB = ModelHub(Path(), skip_download=True)
(T2V,) = (case for case in CASES if case.name == "wan_t2v")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A training of the tiny Wan in the authors' names."""
    folder = tmp_path_factory.mktemp("krea")
    write(folder / "model")
    table = rows(folder / "data")
    return {
        "dataset_base_path": str(table.parent),
        "dataset_metadata_path": str(table),
        "cache_path": str(folder / "cache"),
        "learning_rate": 1e-2,
        **T2V.models(folder / "model", "original"),
        **T2V.parameters,
    }


@pytest.fixture(scope="module")
def krea(plain: dict[str, Any]) -> dict[str, Any]:
    """The same, with `model.` before the names of the transformer's tensors."""
    dit, *others = plain["model_paths"]
    named = Path(dit).parents[2] / "krea-realtime-video-14b.safetensors"
    save_file({f"model.{name}": tensor for name, tensor in load_file(dit).items()}, named)
    return {**plain, "model_paths": [str(named), *others]}


def test_it_is_recognised_as_the_wan_that_it_is(
    plain: dict[str, Any], krea: dict[str, Any], tmp_path: Path
) -> None:
    states: list[dict[str, torch.Tensor]] = []
    for values in (plain, krea):
        given = {**values, "lora_base_model": "dit", "output_path": str(tmp_path)}
        found = find_model(make_config(given), HUB)
        assert found.family.name == "wanvideo"
        assert set(found.components) == {"dit", "text_encoder", "vae"}
        states.append(load_component(found.components["dit"], "cpu", torch.float32).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("kind", [{"lora_base_model": "dit"}, {"trainable_models": "dit"}])
def test_what_is_trained_has_the_names_that_other_tools_know(
    kind: dict[str, str], plain: dict[str, Any], krea: dict[str, Any], tmp_path: Path
) -> None:
    """Checkpoints and exports are those of the same model without `model.`."""
    weights: list[dict[str, torch.Tensor]] = []
    for name, values in (("plain", plain), ("krea", krea)):
        given = {**values, **kind}
        run = train_to_end(given, tmp_path / name)
        weights.append(load_file(run / "epoch-0.safetensors"))
    one, other = weights
    assert one.keys() == other.keys()
    assert not any(name.startswith("model.") for name in one)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    config = make_config({**krea, **kind, "output_path": str(tmp_path / "krea")})
    record, found = read_record(tmp_path / "krea"), find_model(config, HUB)
    assert record is not None
    for exported in export_run(config, record, found):
        verify_export(exported, found)
        held = load_file(exported.path)
        assert not any(name.startswith("model.") for name in held)
    if "trainable_models" in kind:
        (authors,) = (tmp_path / "krea" / "exports" / "authors").rglob("*.safetensors")
        assert load_file(authors).keys() == load_file(plain["model_paths"][0]).keys()
