"""A full training goes on from the weights of a checkpoint, an export, or the authors' file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Values, make_config, model_files, record_of, train_to_end, why_refused
from families.flux.cases import CASES as FLUX
from families.stable_diffusion.cases import CASES as SD
from families.wanvideo.cases import CASES as WAN
from family_case import Case
from safetensors.torch import load_file, save_file
from test_families import HUB, Place

from diffsynth_dagster.errors import ParameterError, WeightsError
from diffsynth_dagster.export import export_run
from diffsynth_dagster.families.contract import Tensors
from diffsynth_dagster.preflight import check_config
from diffsynth_dagster.run.resume_point import state_folders
from diffsynth_dagster.training.build import build_step
from diffsynth_dagster.training.state import read_state
from diffsynth_dagster.weights.identify import find_model, guess_model
from diffsynth_dagster.weights.load import load_component
from diffsynth_dagster.weights.models import Models

FULL = {"trainable_models": ["dit"], "learning_rate": 1e-2}


def weights(config_values: dict[str, Any], trained: bool) -> Tensors:
    """The weights of a config before its first step, by the names of the module: those that are trained,
    or the others."""
    config = make_config(config_values)
    found = find_model(config, HUB)
    step = build_step(
        config, Models(found, torch.device("cpu"), torch.float32, False), torch.float32
    )
    named = ((n.split(".", 2)[2], p) for n, p in step.named_parameters())
    return {name: p.detach() for name, p in named if p.requires_grad == trained}


def started(config_values: dict[str, Any]) -> Tensors:
    return weights(config_values, trained=True)


def assert_equal(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].float()) for name in ours)


@pytest.mark.parametrize("removed", ["pipe.dit.", ""])
def test_a_training_goes_on_from_a_checkpoint_and_from_its_export(
    values: Values, tmp_path: Path, removed: str
) -> None:
    config = values(**FULL, remove_prefix_in_ckpt=removed)
    run = train_to_end(config, tmp_path / "first")
    checkpoint = run / "epoch-0.safetensors"
    trained = {n.removeprefix("pipe.dit."): t for n, t in load_file(checkpoint).items()}
    assert any(not torch.equal(trained[n], t) for n, t in started(config).items())
    record = record_of(run)
    whole = make_config({**config, "output_path": str(run)})
    (export,) = export_run(whole, record, find_model(whole, HUB))
    for file in (checkpoint, export.path):
        assert_equal(started({**config, "resume_from_checkpoint": str(file)}), trained)
    again = {**config, "resume_from_checkpoint": str(checkpoint)}
    run = train_to_end({**again, "state_steps": 1}, tmp_path / "second")
    # Weights only: the optimizer has made the steps of the second training.
    written = read_state(state_folders(run)[0][1])
    state = written.whole(load_file(written.tensors))
    steps = {float(s["step"]) for s in state.pieces["optimizer"]["state"].values()}
    assert steps == {2.0}
    record = record_of(run)
    assert "resume_from_checkpoint" in record.base


@pytest.mark.parametrize("case", [FLUX[0], WAN[0], SD[0]], ids=["flux", "wan", "sd15"])
def test_the_authors_file_is_read(case: Case, tmp_path: Path) -> None:
    """Also that of a whole checkpoint."""
    case.write(tmp_path / "model")
    place = Place(case, tmp_path / "model", case.rows(tmp_path / "data"), tmp_path)
    given = place.values(lora_base_model=[], trainable_models=[case.base], seed=3)
    for name in ("lora_target_modules", "lora_rank", "align_to_opensource_format"):
        given.pop(name, None)
    config = place.config("original")
    item = find_model(config, HUB).components[case.base]
    changed = {
        n: t * 2 if t.is_floating_point() else t for n, t in load_file(item.files[0]).items()
    }
    save_file(changed, tmp_path / "theirs.safetensors")
    wanted = load_component(item, "cpu", torch.float32)
    ours = started({**given, "resume_from_checkpoint": str(tmp_path / "theirs.safetensors")})
    assert_equal(ours, {name: 2 * p for name, p in wanted.named_parameters()})


def test_a_part_of_a_model_goes_on_from_its_own_weights(tmp_path: Path) -> None:
    """And from an export, which holds the whole model."""
    case = next(c for c in WAN if c.base == "vace")
    case.write(tmp_path / "model")
    place = Place(case, tmp_path / "model", case.rows(tmp_path / "data"), tmp_path)
    given = place.values(lora_base_model=[], trainable_models=["vace"], learning_rate=1e-2)
    for name in ("lora_target_modules", "lora_rank"):
        given.pop(name)
    run = train_to_end(given, tmp_path / "run")
    trained = load_file(run / "epoch-0.safetensors")
    whole = make_config({**given, "output_path": str(run)})
    record = record_of(run)
    (export,) = export_run(whole, record, find_model(whole, HUB))
    other = tmp_path / "other.safetensors"
    tensors = load_file(export.path)
    held = {name.removeprefix("pipe.vace.") for name in trained}
    save_file({n: t if n in held else t + 1 for n, t in tensors.items()}, other)
    for file in (run / "epoch-0.safetensors", export.path, other):
        assert_equal(started({**given, "resume_from_checkpoint": str(file)}), trained)
    # Of another version, the rest of the model is not taken over.
    frozen = weights({**given, "resume_from_checkpoint": str(other)}, trained=False)
    name = next(name for name in sorted(frozen) if name in tensors)
    assert torch.equal(frozen[name], tensors[name].to(frozen[name].dtype))
    # Nor are files that became others since mixed with what was trained.
    found = find_model(whole, HUB)
    (file,) = found.components[found.family.part("vace").of].files
    save_file({n: t + 1 for n, t in load_file(file).items()}, file)
    with pytest.raises(WeightsError, match="not those that the training began with"):
        export_run(whole, record, find_model(whole, HUB))


def test_a_lora_that_would_be_lost_is_refused(values: Values, tmp_path: Path) -> None:
    file, lora = tmp_path / "whole.safetensors", tmp_path / "lora.safetensors"
    lora.touch()
    given = values(**FULL, resume_from_checkpoint=str(file), preset_lora_path=str(lora))
    config = make_config(given)
    with pytest.raises(ParameterError, match="the LoRA would be lost"):
        check_config(config, guess_model(config))


def unfit(kind: str, model: Path, folder: Path) -> Path:
    """A file that holds something else than the weights of a `dit`."""
    file = folder / f"{kind}.safetensors"
    dit, text_encoder, _ = map(Path, model_files(model))
    tensors = load_file(dit)
    first = sorted(tensors)[0]
    match kind:
        case "none":
            return file
        case "another":
            return text_encoder
        case "part":
            del tensors[first]
        case "sizes":
            tensors[first] = tensors[first].repeat(2, *(1,) * (tensors[first].ndim - 1))
        case "more":
            tensors["pipe.vae.decoder.weight"] = torch.ones(1)
        case "nan":
            tensors[first][0] = float("nan")
        case "lora":
            name = "transformer_blocks.0.attn.to_q.lora_{}.weight"
            tensors = {name.format(half): torch.ones(4, 4) for half in "AB"}
        case "damaged":
            file.write_bytes(dit.read_bytes()[:-10])
            return file
    save_file(tensors, file)
    return file


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("none", "the checkpoint does not exist"),
        ("another", "it lacks "),
        ("part", "the file is not the weights of one 'dit': it lacks "),
        ("sizes", "it is of another size: "),
        ("more", "it holds what the model lacks: vae.decoder.weight"),
        ("lora", "give it as lora_checkpoint, and train a LoRA"),
        ("damaged", "what to do: "),
        ("nan", "hold NaN or infinity"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_before_anything_is_encoded(
    values: Values,
    tiny_qwen: Path,
    tmp_path: Path,
    kind: str,
    said: str,
) -> None:
    file = unfit(kind, tiny_qwen, tmp_path)
    store = tmp_path / "store"
    config = values(**FULL, cache_path=str(store), resume_from_checkpoint=str(file))
    error = why_refused(config, tmp_path / "run")
    assert said in error
    assert str(file) in error
    assert error.count("error: ") == 1
    # What only the numbers tell is found when they are read.
    assert kind == "nan" or not list(store.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "--resume_from_checkpoint is given but no --trainable_models"),
        ({"trainable_models": ["dit", "vae"]}, "holds one model, and more than one is trained"),
        (
            {"trainable_models": ["vae"], "lora_base_model": ["dit"], "lora_rank": 4},
            "holds one model, and more than one is trained",
        ),
    ],
)
def test_it_is_for_one_model_that_is_trained_in_full(
    values: Values, tmp_path: Path, more: Any, said: str
) -> None:
    assert said in why_refused(values(**more, resume_from_checkpoint="a"), tmp_path / "run")
