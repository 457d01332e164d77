"""What DoRA, LoKr, OFT and rank-stabilised LoRA are refused with; in which precision they work; and that
a stopped training goes on exactly."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Values, make_config, model_files, train_to_end, why_refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_families import HUB
from test_resume import LONG, contents, never, stop_after

from diffsynth_dagster.errors import ParameterError, WeightsError
from diffsynth_dagster.families import find_family
from diffsynth_dagster.preflight import check_headers
from diffsynth_dagster.train import run as run_training
from diffsynth_dagster.training.adapters import is_adapter
from diffsynth_dagster.training.build import build_step
from diffsynth_dagster.training.step import weight_dtype
from diffsynth_dagster.weights.adapter_files import read_adapter
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.models import Models

DORA: dict[str, Any] = {"lora_method": "dora"}
LOKR: dict[str, Any] = {"lora_method": "lokr", "lora_rank": 2}
OFT: dict[str, Any] = {"lora_method": "oft", "lora_rank": None, "oft_block_size": 16}


@pytest.fixture(scope="module")
def files() -> dict[str, Path]:
    """Checkpoints by the method that made them; filled by the first tests that need them."""
    return {}


def checkpoint(values: Values, files: dict[str, Path], folder: Path, **method: Any) -> Path:
    name = str(method.get("lora_method", "lora"))
    if name not in files:
        run = train_to_end(values(**method), folder / "made" / name)
        files[name] = run / "epoch-0.safetensors"
    return files[name]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({**LOKR, "use_rslora": True}, "'use_rslora' means nothing for 'lora_method' = lokr"),
        ({**OFT, "use_rslora": True}, "'use_rslora' means nothing for 'lora_method' = oft"),
        ({**OFT, "lora_rank": 4}, "'lora_rank' means nothing for 'lora_method' = oft"),
        ({**OFT, "lora_alpha": 4.0}, "'lora_alpha' means nothing"),
        ({**OFT, "lora_dropout": 0.1}, "'lora_dropout' means nothing"),
        ({**LOKR, "lora_dropout": 0.1}, "'lora_dropout' means nothing"),
        ({**DORA, "lokr_decompose_factor": 2}, "'lokr_decompose_factor' means nothing"),
        ({"lokr_decompose_both": True}, "'lokr_decompose_both' means nothing"),
        ({"oft_block_size": 8}, "'oft_block_size' means nothing for 'lora_method' = lora"),
        ({**LOKR, "lokr_decompose_factor": 0}, "'lokr_decompose_factor' = 0 divides nothing"),
        ({**DORA, "align_to_opensource_format": True}, "or give 'lora_method' as lora"),
        ({"lora_method": "loha"}, "'lora_method' = "),
        ({"trainable_models": ["dit"], "lora_method": "dora"}, "no 'lora_base_model'"),
    ],
)
def test_what_means_nothing_for_a_method_is_refused(
    values: Values, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ParameterError) as error:
        make_config(values(**given))
    assert said in str(error.value)


def refusal(config: dict[str, Any], folder: Path) -> str:
    """What is said of a training that is refused before it encodes anything."""
    store = folder / "store"
    said = why_refused({**config, "cache_path": str(store)}, folder / "run")
    assert said.count("error: ") == 1
    assert "Traceback" not in said
    assert not list(store.rglob("*.safetensors"))
    return said


@pytest.mark.parametrize(
    ("made", "given", "said"),
    [
        ({}, DORA, "the file holds a lora, and lora_method is dora"),
        (DORA, LOKR, "the file holds a dora, and lora_method is lokr"),
        (LOKR, OFT, "the file holds a lokr, and lora_method is oft"),
        (OFT, DORA, "the file holds a oft, and lora_method is dora"),
        (DORA, {}, "another way than by a plain LoRA"),
        (LOKR, {}, "another way than by a plain LoRA"),
        (OFT, {}, "another way than by a plain LoRA"),
        (DORA, {**DORA, "lora_rank": 2}, "is (4, 64) in the file, not (2, 64)"),
        (DORA, {**DORA, "lora_target_modules": ["to_q"]}, "the file has besides "),
        (DORA, {**DORA, "lora_target_modules": ["to_q", "to_v", "to_k"]}, "the file lacks "),
        (LOKR, {**LOKR, "lokr_decompose_factor": 4}, "made with decompose_factor = -1, not 4"),
        (LOKR, {**LOKR, "lora_rank": 1}, "in the file, not "),
        (OFT, {**OFT, "oft_block_size": 8}, "made with oft_block_size = 16, not 8"),
    ],
)
def test_a_start_of_another_kind_is_refused_before_anything_is_encoded(
    values: Values,
    files: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    made: dict[str, Any],
    given: dict[str, Any],
    said: str,
) -> None:
    file = checkpoint(values, files, tmp_path_factory.mktemp("made"), **made)
    config = values(**given, lora_checkpoint=str(file))
    error = refusal(config, tmp_path)
    assert said in error
    assert f"where: lora_checkpoint = {file}" in error


@pytest.mark.parametrize("made", [DORA, LOKR, OFT], ids=["dora", "lokr", "oft"])
def test_only_a_plain_lora_is_fused(
    values: Values,
    files: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    made: dict[str, Any],
) -> None:
    file = checkpoint(values, files, tmp_path_factory.mktemp("made"), **made)
    error = refusal(values(preset_lora_path=str(file)), tmp_path)
    assert "another way than by a plain LoRA" in error
    assert f"where: preset_lora_path = {file}" in error


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({**OFT, "oft_block_size": 24}, "a width of 64 is no multiple of oft_block_size = 24"),
        ({**DORA, "fp8_models": "dit"}, "a DoRA measures the weights of 'dit'"),
    ],
)
def test_layers_that_a_method_cannot_change_are_refused(
    values: Values, tiny_qwen: Path, tmp_path: Path, given: dict[str, Any], said: str
) -> None:
    if "fp8_models" in given:
        given = {**given, "fp8_models": [model_files(tiny_qwen)[0]]}
    assert said in refusal(values(**given), tmp_path)


def test_a_lokr_of_lycoris_is_scaled_as_there(values: Values, tmp_path: Path) -> None:
    """By alpha / rank where a factor has a rank, and by 1 where none has, whatever alpha says."""
    layer = "transformer_blocks.0.attn.to_{}"
    full, low = layer.format("q"), layer.format("v")
    tensors = {
        f"{full}.lokr_w1": torch.randn(8, 8),
        f"{full}.lokr_w2": torch.randn(16, 16),
        f"{full}.alpha": torch.tensor(7.0),
        f"{low}.lokr_w1": torch.randn(8, 8),
        f"{low}.lokr_w2_a": torch.randn(16, 2),
        f"{low}.lokr_w2_b": torch.randn(2, 16),
        f"{low}.alpha": torch.tensor(6.0),
    }
    for prefix in ("", "diffusion_model.", "transformer."):
        file = tmp_path / "lokr.safetensors"
        save_file({prefix + name: tensor for name, tensor in tensors.items()}, file)
        read = read_adapter(file, find_family("qwen_image"), "dit", "the test")
        assert read.scale == {full: 1.0, low: 3.0}
        assert read.tensors.keys() == {n for n in tensors if not n.endswith(".alpha")}


@pytest.mark.parametrize("rank", [2, 8])
def test_a_start_of_another_scale_is_brought_to_that_of_the_training(
    values: Values, tmp_path: Path, rank: int
) -> None:
    """As rank-stabilised DoRA, and as LoKr with whole and with low-rank factors."""
    for method in ({**DORA, "use_rslora": True}, {"lora_method": "lokr"}):
        given: dict[str, Any] = {**method, "lora_rank": rank}
        run = train_to_end(values(**given, lora_alpha=3.0), tmp_path / given["lora_method"])
        file = run / "epoch-0.safetensors"
        with safe_open(file, "pt") as opened:
            said = json.loads(opened.metadata()["diffsynth_dagster"])["lora"]
        config = make_config(values(**given, lora_alpha=1.5, lora_checkpoint=str(file)))
        found = find_model(config, HUB)
        models = Models(found, torch.device("cpu"), torch.float32, False)
        step = build_step(config, models, torch.float32)
        scaled = ("lora_B.default.weight", "lokr_w1.default")
        tensors = load_file(file)
        assert said["alpha"] / config.alpha == pytest.approx(2.0)
        for name, parameter in step.loaded["dit"].named_parameters():
            if is_adapter(name):
                factor = 2.0 if name.endswith(scaled) else 1.0
                own = tensors[name.replace(".default", "").replace("vector.weight", "vector")]
                assert torch.allclose(parameter, factor * own, rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "stored"),
    [
        pytest.param(DORA, "bfloat16", id="dora-bfloat16"),
        pytest.param(LOKR, "bfloat16", id="lokr-bfloat16"),
        pytest.param(OFT, "bfloat16", id="oft-bfloat16"),
        pytest.param(LOKR, "float8", id="lokr-float8"),
        pytest.param(OFT, "float8", id="oft-float8"),
    ],
)
def test_frozen_weights_may_be_less_precise(
    values: Values, tiny_qwen: Path, method: dict[str, Any], stored: str
) -> None:
    """What is trained is float32, and starts as the base, computed in the base's precision."""
    more = {"fp8_models": [model_files(tiny_qwen)[0]]} if stored == "float8" else {}
    config = make_config(values(**method, **more))
    found = find_model(config, HUB)
    check_headers(config, found, torch.float32)
    later = frozenset({"dit"}) if stored == "float8" else frozenset[str]()

    def models(keep: frozenset[str]) -> Models:
        return Models(found, torch.device("cpu"), torch.bfloat16, False, keep)

    step = build_step(config, models(later), torch.float32)
    ours, base = step.loaded["dit"], models(frozenset()).get(["dit"])["dit"]
    trained = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert trained.keys() == {n for n, _ in ours.named_parameters() if is_adapter(n)}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert weight_dtype(ours) == torch.bfloat16
    source = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 4, 64, generator=source),
        "encoder_hidden_states": torch.randn(1, 5, 256, generator=source),
        "timestep": torch.tensor([0.5]),
    }
    given = {n: t.to(torch.bfloat16) for n, t in inputs.items()}
    more = {"img_shapes": [[(1, 2, 2)]], "encoder_hidden_states_mask": torch.ones(1, 5)}
    predicted: list[torch.Tensor] = []
    for module in (ours, base):
        with torch.autocast("cpu", torch.bfloat16):
            predicted.append(module(**given, **more).sample)
    assert torch.equal(*predicted)
    predicted[0].float().square().mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in trained.values())


@pytest.mark.parametrize(
    "method",
    [{**DORA, "use_rslora": True}, {**LOKR, "lora_dropout": None}, {**OFT, "lora_dropout": None}],
    ids=["dora", "lokr", "oft"],
)
def test_a_stopped_training_ends_with_the_same_files(
    values: Values, tmp_path: Path, method: dict[str, Any]
) -> None:
    given = {**LONG, **method}
    run = train_to_end(values(**given), tmp_path / "undisturbed")
    config = values(**given, output_path=str(tmp_path / "run"))
    stop_after({**config, "output_path": str(tmp_path / "run")}, 3, 2)
    assert run_training(make_config({**config, "output_path": str(tmp_path / "run")}), never)
    assert contents(tmp_path / "run") == contents(run)


def test_a_file_that_does_not_say_how_it_rotates_is_refused(
    values: Values, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    file = checkpoint(values, files, tmp_path_factory.mktemp("made"), **OFT)
    save_file(load_file(file), tmp_path / "bare.safetensors")
    config = make_config(values(**OFT, lora_checkpoint=str(tmp_path / "bare.safetensors")))
    with pytest.raises(WeightsError, match="does not say how its rotations are computed"):
        check_headers(config, find_model(config, HUB), torch.float32)
