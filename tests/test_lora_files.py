"""LoRA files as users have them: the spellings of other tools, and files that do not fit."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import train_to_end, why_refused
from families.wanvideo.cases import CASES, rows, write
from families.wanvideo.original import DIT_NAMES, renamed
from safetensors.torch import load_file, save_file

from diffsynth_dagster.errors import WeightsError
from diffsynth_dagster.families import find_family
from diffsynth_dagster.families.contract import Tensors
from diffsynth_dagster.families.flux.lora import TRANSFORMER
from diffsynth_dagster.families.lora import Lora
from diffsynth_dagster.formats.kohya import FORMAT as KOHYA
from diffsynth_dagster.formats.names import lora_of, with_dots
from diffsynth_dagster.weights.lora import LoraFile, read_lora

WAN = CASES[0]
PREFIXES = ("", "diffusion_model.", "transformer.", "pipe.dit.")
SPELLINGS = ("lora_A,lora_B", "lora_A.default,lora_B.default", "lora_down,lora_up")
Values = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> Values:
    """The parameters of a LoRA training of one step of Wan; a value of None leaves one out."""
    folder = tmp_path_factory.mktemp("wan")
    write(folder / "model")
    table = rows(folder / "data")

    def make(**overrides: Any) -> dict[str, Any]:
        base: dict[str, Any] = {
            "family": "wanvideo",
            "dataset_base_path": str(table.parent),
            "dataset_metadata_path": str(table),
            **WAN.models(folder / "model", "diffusers"),
            **WAN.parameters,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "lora_base_model": "dit",
            "lora_rank": 4,
            "lora_alpha": 2.0,
            "cache_path": str(folder / "cache"),
        }
        return {k: v for k, v in {**base, **overrides}.items() if v is not None}

    return make


@pytest.fixture(scope="module")
def checkpoint(values: Values, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of all usual layers, alpha / rank = 1/2, with its alphas in the tensors."""
    run = train_to_end(values(num_epochs=5), tmp_path_factory.mktemp("lora") / "run")
    read = read_lora(run / "epoch-4.safetensors", find_family("wanvideo"), "dit", "the test")
    assert set(read.scale.values()) == {1.0}  # s is in B
    own = Lora(read.down, {n: b * 2 for n, b in read.up.items()}, dict.fromkeys(read.down, 0.5))
    save_file(with_dots("", own, alphas=True), run / "lora.safetensors")
    return run / "lora.safetensors"


def by_module(file: Path) -> Tensors:
    """The A and B of a LoRA of Wan, by the names of the module's layers."""
    read = read_lora(file, find_family("wanvideo"), "dit", "the test")
    return with_dots("", read, alphas=False)


def respelled(tensors: Tensors, prefix: str, spelling: str, authors: bool, alpha: float) -> Tensors:
    """A LoRA by this trainer's names → as another tool writes it."""
    a, b = spelling.split(",")
    written: Tensors = {}
    for name, tensor in (renamed(tensors, DIT_NAMES) if authors else tensors).items():
        layer, half = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name).groups()  # pyright: ignore[reportOptionalMemberAccess]
        written[f"{prefix}{layer}.{a if half == 'A' else b}.weight"] = tensor.clone()
        written[f"{prefix}{layer}.alpha"] = torch.tensor(alpha)
    return written


def assert_equal(one: LoraFile, other: LoraFile) -> None:
    for ours, theirs in ((one.down, other.down), (one.up, other.up)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert one.scale == other.scale


@pytest.mark.parametrize("authors", [False, True], ids=["diffusers", "authors"])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_spelling_is_read_alike(
    checkpoint: Path, tmp_path: Path, prefix: str, spelling: str, authors: bool
) -> None:
    wan = find_family("wanvideo")
    ours = read_lora(checkpoint, wan, "dit", "the test")
    assert len(ours.down) == 2 * (8 + 2)
    assert set(ours.scale.values()) == {0.5}
    tensors = respelled(by_module(checkpoint), prefix, spelling, authors, 2.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    assert_equal(read_lora(tmp_path / "lora.safetensors", wan, "dit", "the test"), ours)
    # Without an alpha, alpha is the rank.
    bare = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    save_file(bare, tmp_path / "bare.safetensors")
    read = read_lora(tmp_path / "bare.safetensors", wan, "dit", "the test")
    assert set(read.scale.values()) == {1.0}


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"transformer.lora_alpha": 8}, 2.0),
        ({"text_encoder.lora_alpha": 64, "transformer.lora_alpha": 8}, 2.0),
        ({"transformer.lora_alpha": 4, "transformer.use_rslora": True}, 2.0),
        ({"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"attn1.to_q": 16}}, 4.0),
        ({"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"to_k": 16}}, 1.0),
        ({"text_encoder.lora_alpha": 64}, 1.0),
    ],
)
def test_the_alpha_of_peft_is_read(tmp_path: Path, settings: dict[str, Any], scale: float) -> None:
    layer = "transformer.blocks.0.attn1.to_q"
    tensors = {f"{layer}.lora_{half}.weight": torch.ones(4, 4) for half in "AB"}
    notes = {"lora_adapter_metadata": json.dumps(settings)}
    save_file(tensors, tmp_path / "lora.safetensors", metadata=notes)
    read = read_lora(tmp_path / "lora.safetensors", find_family("wanvideo"), "dit", "the test")
    assert read.scale == {"blocks.0.attn1.to_q": scale}


@pytest.mark.parametrize("extra", ["diff_b", "dora_scale", "lora_magnitude_vector", "hada_w1_a"])
def test_what_is_more_than_a_lora_is_refused(checkpoint: Path, tmp_path: Path, extra: str) -> None:
    """Reading the LoRA in it alone would give another model than the file's."""
    tensors = {**by_module(checkpoint), f"blocks.0.attn1.to_q.{extra}": torch.ones(4)}
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(WeightsError, match=f"another way than by a plain LoRA.*{extra}"):
        read_lora(tmp_path / "lora.safetensors", find_family("wanvideo"), "dit", "the test")


@pytest.mark.parametrize("of", ["self_attn.q", "cross_attn.k", "ffn.0"])
def test_a_lora_of_some_of_the_authors_layers_is_read(tmp_path: Path, of: str) -> None:
    layers = {"self_attn.q": "attn1.to_q", "cross_attn.k": "attn2.to_k", "ffn.0": "ffn.net.0.proj"}
    for blocks, prefix in (("blocks", "diffusion_model."), ("vace_blocks", "pipe.vace.")):
        tensors = {f"{prefix}{blocks}.0.{of}.lora_{n}.weight": torch.ones(4, 4) for n in "AB"}
        save_file(tensors, tmp_path / "lora.safetensors")
        name = "dit" if blocks == "blocks" else "vace"
        read = read_lora(tmp_path / "lora.safetensors", find_family("wanvideo"), name, "the test")
        assert list(read.down) == [f"{blocks}.0.{layers[of]}"]


def test_a_file_of_another_tool_is_a_start_and_a_base(
    values: Values, checkpoint: Path, tmp_path: Path
) -> None:
    """What is trained from it is what is trained from this trainer's own file, to the bit."""
    ours = by_module(checkpoint)
    files = {"ours": checkpoint}
    for spelling, prefix in zip(SPELLINGS, PREFIXES[1:], strict=True):
        files[spelling] = tmp_path / f"{spelling}.safetensors"
        save_file(respelled(ours, prefix, spelling, True, 2.0), files[spelling])
    run = train_to_end(values(), tmp_path / "without")
    without = load_file(run / "epoch-0.safetensors")
    for parameter in ("lora_checkpoint", "preset_lora_path"):
        trained: dict[str, Tensors] = {}
        for name, file in files.items():
            run = train_to_end(values(**{parameter: str(file)}), tmp_path / parameter / name)
            trained[name] = load_file(run / "epoch-0.safetensors")
        for name in SPELLINGS:
            assert trained[name].keys() == trained["ours"].keys()
            assert all(torch.equal(trained[name][n], t) for n, t in trained["ours"].items())
        assert any(not torch.equal(without[n], t) for n, t in trained["ours"].items())


def test_vace_is_told_by_the_authors_names(tmp_path: Path) -> None:
    source = torch.Generator().manual_seed(0)
    layers = ("vace_blocks.0.attn1.to_out.0", "vace_blocks.0.ffn.net.2", "vace_blocks.0.proj_out")
    tensors: Tensors = {}
    for layer in layers:
        tensors[f"{layer}.lora_A.weight"] = torch.randn(4, 8, generator=source)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(8, 4, generator=source)
    assert "vace_blocks.0.after_proj.lora_A.weight" in renamed(tensors, DIT_NAMES)
    read: list[LoraFile] = []
    for prefix in ("", "pipe.vace.", "pipe.dit.", "diffusion_model."):
        file = tmp_path / "lora.safetensors"
        save_file(respelled(tensors, prefix, SPELLINGS[0], bool(prefix), 1.0), file)
        read.append(read_lora(file, find_family("wanvideo"), "vace", "the test"))
        assert read[-1].down.keys() == set(layers)
        assert_equal(read[-1], read[0])


def test_flux_is_told_by_the_authors_dotted_names(tmp_path: Path) -> None:
    """As ComfyUI has them; kohya's scripts write the same names with underscores."""
    flux, file = find_family("flux"), tmp_path / "lora.safetensors"
    blocks = {"double_blocks.0.img_attn.qkv": "transformer_blocks.0.attn.to_"}
    blocks["single_blocks.1.linear1"] = "single_transformer_blocks.1.attn.to_"
    tensors: Tensors = {}
    for start in blocks.values():
        for letter in "qkv":
            tensors[f"{start}{letter}.lora_A.weight"] = torch.randn(4, 8)
            tensors[f"{start}{letter}.lora_B.weight"] = torch.randn(8, 4)
    kohya = KOHYA.write({"dit": lora_of(tensors, 0.5)}, {"dit": TRANSFORMER}).tensors
    save_file(kohya, file)
    ours = read_lora(file, flux, "dit", "the test")
    assert ours.down.keys() == {n.removesuffix(".lora_A.weight") for n in tensors if "_A." in n}
    dotted: Tensors = {}
    for name, tensor in kohya.items():
        key, _, rest = name.partition(".")
        layer = next(b for b in blocks if b.replace(".", "_") == key.removeprefix("lora_unet_"))
        dotted[f"diffusion_model.{layer}.{rest}"] = tensor
    save_file(dotted, file)
    assert_equal(read_lora(file, flux, "dit", "the test"), ours)
    save_file({n.removeprefix("diffusion_model."): t for n, t in dotted.items()}, file)
    assert_equal(read_lora(file, flux, "dit", "the test"), ours)


def unfit(kind: str, checkpoint: Path, folder: Path) -> Path:
    """A file that does not fit the training which made `checkpoint`."""
    file, fits, query = folder / "lora.safetensors", by_module(checkpoint), "blocks.0.attn1.to_q"
    layers = [f"transformer_blocks.{i}.attn.to_q.lora_{n}.weight" for i in range(4) for n in "AB"]
    other = {name: torch.ones(4, 4) for name in layers}
    files: dict[str, Tensors] = {
        "no lora": {f"{query}.weight": torch.ones(4, 4)},
        "halves": {n: t for n, t in fits.items() if "to_q.lora_B" not in n},
        "torn": {**fits, f"{query}.lora_A.weight": torch.ones(3, 128)},
        "fewer layers": {n: t for n, t in fits.items() if ".to_q." not in n},
        "other sizes": {n: t.repeat(1, 2) if "_A." in n else t for n, t in fits.items()},
        "other model": other,
        "other family": other,
    }
    family = json.dumps({"family": "qwen_image"})
    if kind in files:
        notes = {"diffsynth_dagster": family} if kind == "other family" else None
        save_file(files[kind], file, notes)
    return file


LACKS = "layers that the model lacks: " + ", ".join(
    f"transformer_blocks.{i}.attn.to_q" for i in range(3)
)
UNFIT = [
    ("no file", "the LoRA file does not exist"),
    ("no lora", "in another way than by a plain LoRA: blocks.0.attn1.to_q.weight"),
    ("halves", "half of a LoRA, or halves of two ranks: blocks.0.attn1.to_q.lora_A.weight"),
    ("torn", "half of a LoRA, or halves of two ranks: blocks.0.attn1.to_q.lora_A.weight"),
    ("other sizes", "is for (128, 256), not for (128, 128)"),
    ("other model", f"{LACKS} and 1 more\n"),
    ("other family", f"{LACKS} and 1 more; its header says that it is a LoRA of the family "),
]
UNFIT_START = [
    ("fewer layers", {}, "the LoRA file lacks blocks.0.attn1.to_q, blocks.0.attn2.to_q"),
    ("fits", {"lora_target_modules": ["q"]}, "the LoRA file has besides blocks.0.attn1.to_k"),
    ("fits", {"lora_rank": 8}, "lora_A.weight is (4, 128) in the file, not (8, 128)"),
]


@pytest.mark.parametrize(
    ("task", "parameter", "kind", "overrides", "message"),
    [("sft", "lora_checkpoint", kind, {}, message) for kind, message in UNFIT]
    + [("sft", "lora_checkpoint", *row) for row in UNFIT_START]
    + [("sft", "preset_lora_path", kind, {}, message) for kind, message in UNFIT[::3]]
    + [("sft:data_process", "lora_checkpoint", kind, {}, message) for kind, message in UNFIT[::4]],
)
def test_a_lora_that_does_not_fit_is_refused_before_anything_is_encoded(
    values: Values,
    checkpoint: Path,
    tmp_path: Path,
    task: str,
    parameter: str,
    kind: str,
    overrides: dict[str, Any],
    message: str,
) -> None:
    file = checkpoint if kind == "fits" else unfit(kind, checkpoint, tmp_path)
    cache = tmp_path / "cache"
    given = values(cache_path=str(cache), task=task, **{parameter: str(file)}, **overrides)
    said = why_refused(given, tmp_path / "run")
    assert message in said
    assert f"where: {parameter} = {file}" in said
    assert said.count("error: ") == 1
    assert not list(cache.rglob("*.safetensors"))
    # The same store is filled where the LoRA fits.
    if kind == "no file" and task == "sft":
        train_to_end(given | {parameter: str(checkpoint)}, tmp_path / "run")
        assert list(cache.rglob("*.safetensors"))
