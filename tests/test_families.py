"""One table: every family and variant keeps the same promises. A new one joins with a row."""

import json
import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from conftest import make_config, record_of, samples_of, train_to_end
from families.flux.cases import CASES as FLUX
from families.ltx2.cases import CASES as LTX
from families.qwen_image.cases import CASES as QWEN
from families.stable_diffusion.cases import CASES as SD
from families.stable_diffusion_xl.cases import CASES as SDXL
from families.wanvideo.cases import CASES as WAN
from family_case import Case
from safetensors.torch import load_file, save_file

from diffsynth_dagster.cache.manifest import read_manifest
from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.errors import WeightsError
from diffsynth_dagster.export import export_run, verify_export
from diffsynth_dagster.families.contract import Tensors
from diffsynth_dagster.training.batches import Batch, StepDataset
from diffsynth_dagster.training.lora_targets import lora_targets
from diffsynth_dagster.training.step import TrainingStep
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.layout import from_layout_of, in_layout_of
from diffsynth_dagster.weights.load import build_empty, load_component
from diffsynth_dagster.weights.lora import fuse_lora, read_lora
from diffsynth_dagster.weights.resolved import ResolvedModel

TABLE = (*QWEN, *FLUX, *WAN, *SD, *SDXL, *LTX)
LAYOUTS = [
    pytest.param(case, layout, id=f"{case.name}-{layout}")
    for case in TABLE
    for layout in case.layouts
]
HUB = ModelHub(Path(), skip_download=True)
TOLERANCE = 1e-5
STEPS = 8
SOME = {"num_epochs": STEPS, "save_steps": STEPS, "learning_rate": 3e-3}


@dataclass
class Place:
    """A case with its model and data on disk, and what has been made of them."""

    case: Case
    model: Path
    data: Path
    folder: Path

    def values(self, layout: str = "diffusers", **overrides: Any) -> dict[str, Any]:
        case = self.case
        values = {
            "family": case.family,
            "dataset_base_path": str(self.data.parent),
            "dataset_metadata_path": str(self.data),
            "lora_base_model": case.base,
            "lora_target_modules": list(case.targets),
            "lora_rank": 4,
            "remove_prefix_in_ckpt": f"pipe.{case.base}.",
            "learning_rate": 1e-3,
            "cache_path": str(self.folder / "cache"),
            "output_path": str(self.folder / "run"),
            **case.models(self.model, layout),
            **case.parameters,
        }
        return values | overrides

    def config(self, layout: str = "diffusers", **overrides: Any) -> TrainingConfig:
        return make_config(self.values(layout, **overrides))

    def found(self, layout: str = "diffusers") -> ResolvedModel:
        return find_model(self.config(layout), HUB)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        read = pl.read_csv if self.data.suffix == ".csv" else pl.read_json
        return read(self.data).to_dicts()

    @cached_property
    def run(self) -> Path:
        """A LoRA trained for some steps on the first row."""
        first = self.folder / f"first{self.data.suffix}"
        if self.data.suffix == ".csv":
            first.write_text("".join(self.data.read_text().splitlines(keepends=True)[:2]))
        else:
            first.write_text(json.dumps(json.loads(self.data.read_text())[:1]))
        values = self.values(dataset_metadata_path=str(first), **SOME)
        run = train_to_end(values, self.folder / "some")
        return run

    @property
    def trained(self) -> Path:
        """The checkpoint of that training which holds the case's LoRA."""
        whole = self.run / f"step-{STEPS}.safetensors"
        return whole if whole.exists() else self.run / f"step-{STEPS}-{self.case.base}.safetensors"

    def encoded(self, **overrides: Any) -> tuple[TrainingConfig, ResolvedModel, StepDataset]:
        """The rows as micro-batches, from the store."""
        folder = self.folder / "encoded"
        values = self.values(task="sft:data_process", **overrides)
        train_to_end(values, folder)
        config = make_config({**values, "output_path": str(folder)})
        found = find_model(config, HUB)
        return config, found, dataset(config, found, folder)


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Place]:
    return {}


@pytest.fixture
def place(
    request: pytest.FixtureRequest,
    places: dict[str, Place],
    tmp_path_factory: pytest.TempPathFactory,
) -> Place:
    case: Case = request.param
    if case.name not in places:
        made = next((p for p in places.values() if p.case.write == case.write), None)
        folder = tmp_path_factory.mktemp(case.name)
        model = folder / "model" if made is None else made.model
        if made is None:
            case.write(model)
        places[case.name] = Place(case, model, case.rows(folder / "data"), folder)
    return places[case.name]


ONE_OF_EACH_KIND = (
    *("qwen_image", "qwen_image_edit", "flux_controlnet", "wan_i2v", "sd15", "sdxl", "ltx2_i2av"),
)
"""What is trained from: text, pictures to edit, a control picture, a first frame, sound."""


def each_kind(function: Any) -> Any:
    """One variant of each kind in `make test`, the others in `make soak`: for what takes a training."""
    cases = [
        pytest.param(c, id=c.name, marks=() if c.name in ONE_OF_EACH_KIND else pytest.mark.soak)
        for c in TABLE
    ]
    return pytest.mark.parametrize("place", cases, indirect=True)(function)


@each_kind
def test_weights_go_back_into_the_layout_of_their_files(place: Place) -> None:
    """All that is trained in full is written as the files have it that it was loaded from."""
    layout = "original" if "original" in place.case.layouts else "diffusers"
    for name, found in place.found(layout).components.items():
        module = load_component(found, "cpu", torch.float32)
        trained = {n: torch.randn(p.shape) for n, p in module.named_parameters()}
        written = in_layout_of(found, trained)
        assert written.keys() <= found.header.keys(), name
        assert all(tuple(t.shape) == found.header[n].shape for n, t in written.items())
        converted = found.component.construction.convert(dict(written))
        read = from_layout_of(found, written)
        assert read.keys() == trained.keys()
        for n, tensor in trained.items():
            assert torch.equal(converted[n], tensor)
            assert torch.equal(read[n], tensor)


def dataset(config: TrainingConfig, found: ResolvedModel, folder: Path) -> StepDataset:
    return StepDataset(config, found, samples_of(folder), 0, 1)


def every_case(function: Any) -> Any:
    ids = [case.name for case in TABLE]
    return pytest.mark.parametrize("place", TABLE, ids=ids, indirect=True)(function)


def load_all(found: ResolvedModel) -> dict[str, torch.nn.Module]:
    return {n: load_component(f, "cpu", torch.float32) for n, f in found.components.items()}


def step_of(config: TrainingConfig, found: ResolvedModel) -> TrainingStep:
    """The training step with nothing trained."""
    modules = {n: m for n, m in load_all(found).items() if n == found.family.denoiser}
    for name in found.family.denoise_uses:
        if name in found.components:
            modules[name] = load_component(found.components[name], "cpu", torch.float32)
    whole = config.model_copy(update={"min_timestep_boundary": 0.0, "max_timestep_boundary": 1.0})
    return TrainingStep(found, modules, {}, whole)


@every_case
def test_every_layout_gives_equal_tensors(place: Place, tmp_path: Path) -> None:
    """And so do the shapes alone, without config.json."""
    found = place.found()
    wanted = {name: module.state_dict() for name, module in load_all(found).items()}
    bare = tmp_path / "model"
    shutil.copytree(place.model, bare)
    for path in bare.rglob("config.json"):
        path.unlink()
    for layout in place.case.layouts:
        config = make_config(place.values(layout) | place.case.models(bare, layout))
        again = find_model(config, HUB)
        assert all(f.config is None for f in again.components.values())
        assert again.components.keys() == wanted.keys()
        for name, module in load_all(again).items():
            state = module.state_dict()
            assert state.keys() == wanted[name].keys()
            assert all(torch.equal(state[key], wanted[name][key]) for key in state)


@pytest.mark.parametrize(("place", "layout"), LAYOUTS, indirect=["place"])
def test_an_incomplete_file_names_what_is_missing(
    place: Place, layout: str, tmp_path: Path
) -> None:
    found = place.found(layout)
    denoiser = found.components[found.family.denoiser]
    broken = tmp_path / "model"
    shutil.copytree(place.model, broken)
    source = denoiser.files[0]
    target = broken / source.relative_to(place.model)
    marks = {name for names in denoiser.component.recognition.signatures for name in names}
    if source.suffix == ".safetensors":
        tensors = load_file(source)
    else:
        tensors = torch.load(source, weights_only=True)
    names = [n.removeprefix(denoiser.start) for n in tensors if n.startswith(denoiser.start)]
    lost = denoiser.start + max(name for name in names if name not in marks)
    del tensors[lost]
    if source.suffix == ".safetensors":
        save_file(tensors, target)
    else:
        torch.save(tensors, target)
    config = make_config(place.values(layout) | place.case.models(broken, layout))
    message = f"not a whole '{found.family.denoiser}': missing: "
    with pytest.raises(WeightsError, match=message) as error:
        build_empty(find_model(config, HUB).components[found.family.denoiser])
    assert str(target) in str(error.value)


@every_case
def test_the_repeated_blocks_of_denoisers_and_controlnets_are_known(place: Place) -> None:
    family, components = place.found().family, place.found().components
    for name in {d.component for d in family.denoisers} | {*family.denoise_uses} & {*components}:
        classes = {type(module).__name__ for module in build_empty(components[name]).modules()}
        assert classes & {*components[name].component.construction.repeated_blocks}, name


def first_batch(place: Place) -> tuple[TrainingConfig, ResolvedModel, Batch]:
    config, found, data = place.encoded()
    visits = [visit for micro in data.order.step(0) for visit in micro]
    return config, found, data._batch(visits, found.family.denoiser, 1.0)


def predict(
    step: TrainingStep, found: ResolvedModel, batch: Batch, x_t: Tensors, t: float
) -> Tensors:
    """Our prediction for a batch of one sample."""
    stages = step._stage_outputs
    *_, conditions = stages.by_role(stages.of(batch, step.loaded, torch.device("cpu")))
    noisy = {name: tensor[None] for name, tensor in x_t.items()}
    with torch.no_grad():
        predicted = step._denoise(found.family.denoiser, conditions, noisy, torch.tensor([t]))
    return {name: tensor[0] for name, tensor in predicted.items()}


def some_x_t(step: TrainingStep, batch: Batch) -> Tensors:
    """Noise in the shape of the sample, with what is known of it in place."""
    stages = step._stage_outputs
    x_0, known, _ = stages.by_role(stages.of(batch, step.loaded, torch.device("cpu")))
    source = torch.Generator().manual_seed(0)
    x_t = {n: torch.randn(t.shape, generator=source) for n, t in x_0.items()}
    for name, mask in known.items():
        x_t[name] = torch.where(mask.bool(), x_0[name], x_t[name])
    return {name: tensor[0] for name, tensor in x_t.items()}


def row_of(place: Place, batch: Batch, found: ResolvedModel, run: Path) -> dict[str, Any]:
    """The columns of the batch's only sample, paths made whole."""
    listed = read_manifest(run).frame.filter(pl.col("sample") == batch.samples[0])
    return whole_row(place, listed["row"][0] - 1, found)


def whole_row(place: Place, index: int, found: ResolvedModel) -> dict[str, Any]:
    """The columns of a row, paths made whole."""
    row = dict(place.rows[index])
    for item in found.family.file_inputs:
        value = row[item.column]
        listed = value if isinstance(value, list) else [value]
        paths = [str(place.data.parent / v) for v in listed]
        row[item.column] = paths if item.many else paths[0]
    return row


@every_case
def test_prediction_is_that_of_the_published_pipeline(place: Place) -> None:
    config, found, batch = first_batch(place)
    step = step_of(config, found)
    x_t = some_x_t(step, batch)
    row = row_of(place, batch, found, place.folder / "encoded")
    theirs, t = place.case.published(place.model, row, x_t, None)
    ours = predict(step, found, batch, x_t, t)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].shape == theirs[name].shape
        # Where the sample is given nothing is predicted.
        assert float((ours[name] - theirs[name]).abs().max()) <= TOLERANCE * max(
            1.0, float(theirs[name].abs().max())
        )


@each_kind
def test_a_batch_equals_its_samples(place: Place) -> None:
    config, found, data = place.encoded(batch_size=4)
    step = step_of(config, found)
    visits = [v for micro in data.order.step(0) for v in micro]
    assert len(visits) == 4
    with torch.no_grad():
        together = step(data._batch(visits, found.family.denoiser, 1.0))
        alone = torch.cat(
            [step(data._batch([visit], found.family.denoiser, 1.0)) for visit in visits]
        )
    assert len({round(float(loss), 9) for loss in alone}) == 4
    assert float(((together - alone) / alone).abs().max()) <= TOLERANCE


@each_kind
def test_cached_equals_online(place: Place, tmp_path: Path) -> None:
    values = place.values(batch_size=2, cache_path=str(tmp_path / "a"))
    train_to_end(values, tmp_path / "online")
    values["cache_path"] = str(tmp_path / "b")
    train_to_end(values | {"task": "sft:data_process"}, tmp_path / "split")
    train_to_end(values | {"task": "sft:train"}, tmp_path / "split")
    names = sorted(path.name for path in (tmp_path / "online").glob("*.safetensors"))
    assert names
    for name in names:
        online = (tmp_path / "online" / name).read_bytes()
        assert online == (tmp_path / "split" / name).read_bytes()


@each_kind
def test_a_few_steps_lower_the_loss(place: Place) -> None:
    """Of the one sample, at noise and timesteps that the training never drew."""
    config = place.config(output_path=str(place.run), **SOME)
    found = find_model(config, HUB)
    data = dataset(config, found, place.run)
    step = step_of(config, found)
    losses: list[float] = []
    for lora in (None, place.trained):
        if lora is not None:
            owner = found.family.part(place.case.base).of
            read = read_lora(lora, found.family, place.case.base, "the test")
            fuse_lora(step.loaded[owner], read, "the test")
        with torch.no_grad():
            batch = data[0][0]
            drawn = [
                replace(batch, visits=[v], denoiser=found.family.denoiser) for v in range(STEPS)
            ]
            losses.append(float(torch.cat([step(b) for b in drawn]).mean()))
    assert losses[1] < losses[0]


@every_case
def test_aliases_reach_the_same_layers(place: Place) -> None:
    found = place.found()
    module = build_empty(found.components[found.family.part(place.case.base).of])
    ours = lora_targets(place.config(), found.family, module, place.case.base)
    named = place.config(lora_target_modules=list(place.case.aliases))
    assert lora_targets(named, found.family, module, place.case.base) == ours
    assert ours


@each_kind
def test_the_exported_lora_predicts_the_same_in_the_pipeline(place: Place) -> None:
    config = place.config(output_path=str(place.run), **SOME)
    found = find_model(config, HUB)
    record = record_of(place.run)
    owner = found.family.part(place.case.base).of
    every = export_run(config, record, found)
    for exported in every:
        verify_export(exported, found)
        assert exported.kind == "lora"
    for exported in (e for e in every if owner in e.components):
        data = dataset(config, found, place.run)
        batch = data[0][0]
        step = step_of(config, found)
        x_t = some_x_t(step, batch)
        row = row_of(place, batch, found, place.run)
        theirs, t = place.case.published(place.model, row, x_t, exported.path)
        without = predict(step, found, batch, x_t, t)
        read = read_lora(place.trained, found.family, place.case.base, "test")
        fuse_lora(step.loaded[owner], read, "test")
        ours = predict(step, found, batch, x_t, t)
        for name in ours:
            scale = max(1.0, float(theirs[name].abs().max()))
            assert float((ours[name] - theirs[name]).abs().max()) <= TOLERANCE * scale
            assert float((ours[name] - without[name]).abs().max()) > 10 * TOLERANCE * scale
