"""One table: every method of training layers keeps the same promises, in every kind of model."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from conftest import make_config, record_of, train, train_to_end
from families.flux.cases import CASES as FLUX
from families.qwen_image.cases import CASES as QWEN
from families.stable_diffusion.cases import CASES as SD
from families.wanvideo.cases import CASES as WAN
from family_case import Case
from lora_support import by_module
from safetensors import safe_open
from safetensors.torch import load_file
from test_families import HUB, Place, dataset, predict, row_of, some_x_t, step_of
from torch import nn

from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.errors import TargetError
from diffsynth_dagster.export import export_run, how_to_load, verify_export
from diffsynth_dagster.families.contract import Tensors
from diffsynth_dagster.preflight import check_headers
from diffsynth_dagster.training.build import build_step
from diffsynth_dagster.training.step import TrainingStep
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.models import Models
from diffsynth_dagster.weights.resolved import ResolvedModel

TOLERANCE = 1e-5
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora_alpha": 2.0},
    "rslora": {"use_rslora": True, "lora_alpha": 3.0},
    "dora": {"lora_method": "dora", "lora_alpha": 2.0},
    "rsdora": {"lora_method": "dora", "use_rslora": True},
    "lokr": {"lora_method": "lokr", "lora_rank": 2, "lora_alpha": 3.0},
    "lokr_both": {
        "lora_method": "lokr",
        "lora_rank": 1,
        "lokr_decompose_factor": 4,
        "lokr_decompose_both": True,
        "learning_rate": 5e-2,
    },
    "oft": {"lora_method": "oft", "lora_rank": None, "oft_block_size": 8},
}
NAMES: dict[str, set[str]] = {
    "lora": {"lora_A.weight", "lora_B.weight"},
    "dora": {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"},
    "lokr": {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"},
    "oft": {"oft_R.weight"},
}
CASES = {c.name: c for c in (QWEN[0], FLUX[0], WAN[0], SD[0])}
WINDOWS = {"sd15": ("conv1", "downsamplers.0.conv")}
"""Case → layers that are convolutions of more than one pixel, which OFT refuses."""
ROWS = [("qwen_image", method) for method in METHODS]
ROWS += [("sd15", method) for method in ("dora", "lokr", "oft")]  # which has convolutions
IN_SOAK = [(name, method) for name in ("flux", "wan_t2v") for method in ("dora", "lokr", "oft")]


@dataclass
class Trained(Place):
    """A case, trained for three steps by a method."""

    method: str = "lora"
    run_folder: Path = field(default_factory=Path)

    @property
    def kind(self) -> str:
        return METHODS[self.method].get("lora_method", "lora")

    def values(self, layout: str = "diffusers", **overrides: Any) -> dict[str, Any]:
        more = WINDOWS.get(self.case.name, ()) if self.kind != "oft" else ()
        values = {
            "lora_target_modules": [*self.case.targets, *more],
            "batch_size": 4,
            "num_epochs": 3,
            "learning_rate": 5e-3,
            **METHODS[self.method],
            **({} if self.kind == "lora" else {"align_to_opensource_format": None}),
            **overrides,
        }
        given = super().values(layout, **values)
        return {name: value for name, value in given.items() if value is not None}

    @property
    def file(self) -> Path:
        return self.run_folder / "epoch-2.safetensors"

    def batch(self, config: TrainingConfig, found: ResolvedModel) -> Any:
        data = dataset(config, found, self.run_folder)
        visits = [v for micro in data.order.step(0) for v in micro][:1]
        return data._batch(visits, found.family.denoiser, 1.0)

    def step(self, **overrides: Any) -> tuple[TrainingConfig, ResolvedModel, TrainingStep]:
        """The training step of a config."""
        config = self.config(output_path=str(self.run_folder), **overrides)
        found = find_model(config, HUB)
        models = Models(found, torch.device("cpu"), torch.float32, False)
        return config, found, build_step(config, models, torch.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Trained]:
    models: dict[str, tuple[Path, Path]] = {}
    done: dict[tuple[str, str], Trained] = {}

    def make(name: str, method: str) -> Trained:
        case: Case = CASES[name]
        if name not in models:
            folder = tmp_path_factory.mktemp(name)
            case.write(folder / "model")
            models[name] = folder, case.rows(folder / "data")
        if (name, method) not in done:
            folder, data = models[name]
            place = Trained(case, folder / "model", data, folder, method)
            code, place.run_folder = train(place.values(), folder / method)
            assert code == 0
            done[name, method] = place
        return done[name, method]

    return make


@pytest.fixture
def place(request: pytest.FixtureRequest, made: Callable[[str, str], Trained]) -> Trained:
    return made(*request.param)


every_row = pytest.mark.parametrize(
    "place",
    [
        *(pytest.param(row, id="-".join(row)) for row in ROWS),
        *(pytest.param(row, id="-".join(row), marks=pytest.mark.soak) for row in IN_SOAK),
    ],
    indirect=True,
)
each_method = pytest.mark.parametrize(
    "place", [pytest.param(("qwen_image", m), id=m) for m in METHODS], indirect=True
)


def trained_of(step: TrainingStep, base: str) -> dict[str, torch.Tensor]:
    """The trained tensors under the names that files give them (written out here once more)."""
    names: dict[str, torch.Tensor] = {}
    for name, parameter in step.named_parameters():
        if parameter.requires_grad:
            short = name.removeprefix(f"components.{base}.").replace(".default", "")
            names[short.replace("vector.weight", "vector")] = parameter
    return names


def difference(one: Tensors, other: Tensors) -> float:
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).abs().max()) for n in one)


def tensors_of(place: Trained) -> Tensors:
    """What the checkpoint holds, by the names of the module."""
    return by_module(place.file, place.case.family, place.case.base)


def header_of(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["diffsynth_dagster"])["lora"]


@every_row
def test_what_is_trained_starts_as_the_base_and_changes(place: Trained) -> None:
    config, found, step = place.step()
    before = trained_of(step, place.case.base)
    after = tensors_of(place)
    assert before.keys() == after.keys()
    kinds = {n for n in NAMES[place.kind] if any(name.endswith(f".{n}") for name in after)}
    assert kinds == NAMES[place.kind] or place.kind == "lokr"
    assert all(any(name.endswith(f".{n}") for n in kinds) for name in after)
    assert all(tensor.dtype == torch.float32 for tensor in [*before.values(), *after.values()])
    assert all(not torch.equal(before[name], after[name]) for name in after)

    batch = place.batch(config, found)
    base = step_of(config, found)
    x_t = some_x_t(base, batch)
    unchanged = predict(base, found, batch, x_t, 500.0)
    assert difference(predict(step, found, batch, x_t, 500.0), unchanged) == 0
    assert check_headers(config, found, torch.float32) == sum(t.nbytes for t in after.values())


@every_row
def test_initial_values_depend_on_the_seed_alone(place: Trained) -> None:
    torch.manual_seed(1)
    one = trained_of(place.step()[2], place.case.base)
    torch.rand(100)
    same = trained_of(place.step()[2], place.case.base)
    other = trained_of(place.step(seed=5)[2], place.case.base)
    assert all(torch.equal(one[name], same[name]) for name in one)
    # A rotation starts as none, and a length as that of the weights.
    differ = [name for name in one if not torch.equal(one[name], other[name])]
    assert bool(differ) == (place.kind != "oft")
    record = record_of(place.run_folder)
    assert (record.trained_tensors, record.changed_tensors) == (len(one), len(one))


def rotation(numbers: torch.Tensor, width: int) -> torch.Tensor:
    """The block-diagonal rotation (1 + Q)(1 - Q)^-1 of rows of skew-symmetric matrices Q."""
    size = width // len(numbers)
    rows, columns = torch.triu_indices(size, size, 1)
    blocks: list[torch.Tensor] = []
    for row in numbers.double():
        q = torch.zeros(size, size, dtype=torch.float64)
        q[rows, columns] = row
        q = q - q.T
        one = torch.eye(size, dtype=torch.float64)
        blocks.append((one + q) @ torch.linalg.inv(one - q))
    return torch.block_diag(*blocks)


def changed_weight(weight: torch.Tensor, own: Tensors, said: dict[str, Any]) -> torch.Tensor:
    """W after a training, by the formulas of the papers from what the file holds alone."""
    flat = weight.double().flatten(1)
    if "oft_R.weight" in own:
        return (flat @ rotation(own["oft_R.weight"], flat.shape[1]).T).view(weight.shape)
    scale = said["alpha"] / said["rank"]
    if "lora_A.weight" in own:
        a, b = own["lora_A.weight"].double(), own["lora_B.weight"].double()
        changed = flat + scale * b.flatten(1) @ a.flatten(1)
        if "lora_magnitude_vector" in own:
            length = own["lora_magnitude_vector"].double().flatten()
            changed = changed * (length / changed.norm(dim=1))[:, None]
        return changed.view(weight.shape)

    def factor(name: str) -> torch.Tensor:
        if name in own:
            return own[name].double()
        return own[f"{name}_a"].double() @ own[f"{name}_b"].double()

    left, right = factor("lokr_w1"), factor("lokr_w2")
    # Each window of a convolution is one matrix: w1 is the same for all places in it.
    right = right.reshape(right.shape[0], weight.shape[1] // left.shape[1], -1)
    windows = [torch.kron(left, right[..., i]) for i in range(right.shape[-1])]
    return weight.double() + scale * torch.stack(windows, -1).view(weight.shape)


@every_row
def test_the_file_says_what_the_model_computes_and_is_gone_on_from(place: Trained) -> None:
    tensors, said = tensors_of(place), header_of(place.file)
    scale = METHODS[place.method].get("lora_alpha", said.get("rank"))
    if place.method.startswith("rs"):
        assert said["alpha"] / said["rank"] == pytest.approx(scale / 4**0.5)
    elif place.kind != "oft":
        assert said["alpha"] == scale
    config, found, step = place.step(lora_checkpoint=str(place.file))
    started = trained_of(step, place.case.base)
    assert started.keys() == tensors.keys()
    assert all(torch.equal(started[name], tensors[name]) for name in tensors)

    batch = place.batch(config, found)
    base = step_of(config, found)
    x_t = some_x_t(base, batch)
    before = predict(base, found, batch, x_t, 500.0)
    module = base.loaded[found.family.part(place.case.base).of]
    for name in {n.removesuffix(".weight").rpartition(".")[0] for n in tensors}:
        own = {
            n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(f"{name}.")
        }
        layer: Any = module.get_submodule(name)
        layer.weight = nn.Parameter(changed_weight(layer.weight, own, said).float())
    by_formula = predict(base, found, batch, x_t, 500.0)
    ours = predict(step, found, batch, x_t, 500.0)
    assert difference(ours, by_formula) <= TOLERANCE
    assert difference(ours, before) > 10 * TOLERANCE


@every_row
def test_the_export_predicts_the_same_where_it_is_loaded(place: Trained) -> None:
    config, found, step = place.step(lora_checkpoint=str(place.file))
    record = record_of(place.run_folder)
    config = place.config(output_path=str(place.run_folder))
    exported = export_run(config, record, found)
    with_kohya = place.kind == "lora" and config.align_to_opensource_format
    formats = ["diffusers", "kohya"] if with_kohya else ["diffusers"]
    assert [e.format for e in exported] == (formats if place.kind in ("lora", "dora") else ["peft"])
    batch = place.batch(config, found)
    x_t = some_x_t(step, batch)
    written = [e.path.read_bytes() for e in exported]
    for item in exported:
        verify_export(item, found)
        if item.format == "peft":
            base, t = step_of(config, found), 500.0
            owner = found.family.part(place.case.base).of
            folder = found.family.component(owner).names.folder
            pipe = SimpleNamespace(**{folder: base.loaded[owner]})
            exec(how_to_load(item, found.family), {"pipe": pipe, "peft": peft})
            base.loaded[owner] = getattr(pipe, folder).base_model.model
            theirs = predict(base, found, batch, x_t, t)
        else:
            row = row_of(place, batch, found, place.run_folder)
            theirs, t = place.case.published(place.model, row, x_t, item.path)
        ours = predict(step, found, batch, x_t, t)
        assert difference(ours, theirs) <= TOLERANCE * max(
            1.0, *(float(tensor.abs().max()) for tensor in theirs.values())
        )
        unchanged = predict(step_of(config, found), found, batch, x_t, t)
        assert difference(ours, unchanged) > 10 * TOLERANCE
    again = export_run(config, record, found)
    assert [e.path.read_bytes() for e in again] == written


@pytest.mark.parametrize(
    ("case", "bases", "method"),
    [
        (SD[0], "unet,text_encoder", "dora"),
        (FLUX[0], "dit,text_encoder", "lokr"),
        (next(c for c in WAN if c.base == "vace"), "dit,vace", "oft"),
    ],
    ids=["sd15-dora", "flux-lokr", "vace-oft"],
)
def test_several_models_get_their_own(case: Case, bases: str, method: str, tmp_path: Path) -> None:
    case.write(tmp_path / "model")
    place = Trained(case, tmp_path / "model", case.rows(tmp_path / "data"), tmp_path, method)
    values = place.values(lora_base_model=bases, lora_target_modules=None, num_epochs=1)
    values["remove_prefix_in_ckpt"] = ""
    run = train_to_end(values, tmp_path / "run")
    config = make_config({**values, "output_path": str(run)})
    found = find_model(config, HUB)
    tensors = load_file(run / "epoch-0.safetensors")
    assert {name.split(".")[1] for name in tensors} == set(bases.split(","))
    told = check_headers(config, found, torch.float32)
    assert told == sum(tensor.nbytes for tensor in tensors.values())
    record = record_of(run)
    exported = export_run(config, record, found)
    assert sum(item.tensors for item in exported) == len(tensors)
    for item in exported:
        verify_export(item, found)


@pytest.mark.parametrize("place", [("sd15", "oft")], ids=["sd15"], indirect=True)
def test_windows_of_convolutions_are_not_rotated(place: Trained) -> None:
    config = place.config(lora_target_modules=["conv1", "to_q"])
    with pytest.raises(
        TargetError, match=r"cannot rotate the windows of a convolution of \(3, 3\)"
    ):
        check_headers(config, find_model(config, HUB), torch.float32)


@each_method
def test_an_export_is_gone_on_from_as_the_checkpoint_is(place: Trained) -> None:
    record = record_of(place.run_folder)
    config = place.config(output_path=str(place.run_folder))
    (exported, *_) = export_run(config, record, find_model(config, HUB))
    tensors = tensors_of(place)
    started = trained_of(place.step(lora_checkpoint=str(exported.path))[2], place.case.base)
    for name, tensor in tensors.items():  # the export has s in its B
        torch.testing.assert_close(started[name].detach(), tensor, rtol=1e-6, atol=0)
