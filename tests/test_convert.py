"""`python -m diffsynth_dagster.export FILE --to FORMAT`, and the proof of what is exported."""

import json
import re
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Values, make_config, record_of, train_to_end
from safetensors.torch import load_file, save_file

from diffsynth_dagster.errors import WeightsError
from diffsynth_dagster.export import export_folder, verify_export
from diffsynth_dagster.export.__main__ import main
from diffsynth_dagster.families import find_family
from diffsynth_dagster.formats import FORMATS
from diffsynth_dagster.formats.change import difference
from diffsynth_dagster.weights.header import read_metadata
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.lora import read_lora


@pytest.fixture(scope="module")
def trained(shared_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a LoRA with alpha / rank = 3/4, exported in every format."""
    given = {**shared_values, "lora_alpha": 3.0, "export_formats": [*FORMATS]}
    run = train_to_end(given, tmp_path_factory.mktemp("converted") / "run", exports=True)
    return run


@pytest.fixture
def checkpoint(trained: Path) -> Path:
    record = record_of(trained)
    return trained / record.newest[0]


def file_of(run: Path, name: str) -> Path:
    file = "adapter_model" if name == "peft" else "pytorch_lora_weights"
    return run / "exports" / name / f"{file}.safetensors"


def read(path: Path) -> Any:
    return read_lora(path, find_family("qwen_image"), "dit", "the test")


def test_every_format_becomes_every_other(
    trained: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = read(checkpoint)
    for source, to in permutations(FORMATS, 2):
        output = tmp_path / f"{source}-{to}"
        output = output if to == "peft" else output.with_suffix(".safetensors")
        assert main([str(file_of(trained, source)), "--to", to, "--output", str(output)]) == 0
        written = output / "adapter_model.safetensors" if to == "peft" else output
        assert difference(read(written), wanted) < 1e-6
        names = {name.partition(".lora_")[0] for name in load_file(written)}
        exported = {name.partition(".lora_")[0] for name in load_file(file_of(trained, to))}
        assert names == exported
        notes = json.loads(read_metadata(written)["diffsynth_dagster"])
        assert notes["format"] == to
        assert notes["samples_digest"]
    said = capsys.readouterr().out
    assert "layers of dit of qwen_image in the names of kohya; the change of each layer is" in said


def test_a_layer_that_is_several_here(tmp_path: Path) -> None:
    """Whose B is not block-diagonal: each of the layers has the whole A."""
    start = "lora_unet_double_blocks_0_img_attn_qkv"
    fused = {
        f"{start}.lora_down.weight": torch.randn(4, 8),
        f"{start}.lora_up.weight": torch.randn(24, 4),
        f"{start}.alpha": torch.tensor(2.0),
    }
    save_file(fused, tmp_path / "fused.safetensors")
    for to in FORMATS:
        assert main([str(tmp_path / "fused.safetensors"), "--to", to]) == 0, to
    read = load_file(tmp_path / "fused-diffusers.safetensors")
    update = fused[f"{start}.lora_up.weight"] @ fused[f"{start}.lora_down.weight"] * 0.5
    for letter, rows in zip("qkv", update.split(8), strict=True):
        layer = f"transformer.transformer_blocks.0.attn.to_{letter}"
        own = read[f"{layer}.lora_B.weight"] @ read[f"{layer}.lora_A.weight"]
        torch.testing.assert_close(own, rows)


def test_the_denoiser_is_what_a_file_of_the_guide_names_without_a_start(tmp_path: Path) -> None:
    layers = {
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": 4,
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q": 8,
    }
    tensors = {
        f"{name}.lora_{half}.weight": torch.randn(shape)
        for name, width in layers.items()
        for half, shape in (("down", (2, width)), ("up", (width, 2)))
    }
    save_file(tensors, tmp_path / "both.safetensors")
    arguments = ["--to", "guide", "--family", "stable_diffusion"]
    assert main([str(tmp_path / "both.safetensors"), *arguments]) == 0
    starts = {name.split(".")[0] for name in load_file(tmp_path / "both-guide.safetensors")}
    assert starts == {"mid_block", "pipe"}


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1
    assert "Traceback" not in said
    return said


def test_what_is_not_converted(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One message each, and nothing is written."""
    tensors = load_file(checkpoint)
    name = next(iter(tensors))
    of_qwen = {n.removeprefix("diffusion_model."): t for n, t in tensors.items()}
    layer = "transformer_blocks.0.attn.to_q"
    ambiguous = {n: t for n, t in of_qwen.items() if n.startswith(layer)}
    files: dict[str, tuple[dict[str, torch.Tensor], str, list[str]]] = {
        "unknown key": ({**of_qwen, "x.diff_b": torch.ones(2)}, "x.diff_b", []),
        "unknown layer": (
            {f"{n}.lora_{h}.weight": torch.ones(2, 2) for n in ("img_in", "y") for h in "AB"},
            "y.lora_A.weight",
            ["--family", "qwen_image"],
        ),
        "other family": (of_qwen, "transformer_blocks.0.attn.to_q", ["--family", "wanvideo"]),
        "ambiguous": (ambiguous, "qwen_image and flux", []),
        "full": ({"proj_out.weight": torch.ones(2, 2)}, "proj_out.weight", []),
    }
    for kind, (held, words, more) in files.items():
        file = tmp_path / f"{kind}.safetensors"
        save_file({n: t.contiguous() for n, t in held.items()}, file)
        assert words in refused(capsys, file, "--to", "kohya", *more), kind
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(checkpoint.read_bytes()[:-100])
    assert "cannot be read" in refused(capsys, cut, "--to", "kohya")
    pickled = tmp_path / "pickle.safetensors"
    torch.save(tensors, pickled)
    assert "pickle" in refused(capsys, pickled, "--to", "kohya")
    assert "does not exist" in refused(capsys, tmp_path / "none.safetensors", "--to", "kohya")
    assert not [*tmp_path.glob("*-kohya*")]
    there = tmp_path / "there.safetensors"
    there.write_text("mine")
    assert "the output exists" in refused(capsys, checkpoint, "--to", "guide", "--output", there)
    assert there.read_text() == "mine"
    assert name in load_file(checkpoint)


def test_a_tool_that_applies_another_change_is_told(
    trained: Path, shared_values: dict[str, Any], tmp_path: Path
) -> None:
    given = {**shared_values, "lora_alpha": 3.0, "export_formats": [*FORMATS]}
    config = make_config({**given, "output_path": str(trained)})
    exported = export_folder(config, ModelHub.from_environment())
    assert exported.problems == []
    assert {item.format for item in exported.files} == {*FORMATS}
    found = find_model(config, ModelHub.from_environment())
    for item in exported.files:
        tensors = load_file(item.path)
        of_b = next(n for n in tensors if re_up(n))
        tensors[of_b] = tensors[of_b] * 1.001
        copied = tmp_path / item.format / item.path.name
        copied.parent.mkdir()
        save_file(tensors, copied, read_metadata(item.path))
        settings = item.path.parent / "adapter_config.json"
        if settings.exists():
            (copied.parent / settings.name).write_text(settings.read_text())
        with pytest.raises(WeightsError, match="it changes a layer of dit by"):
            verify_export(replace(item, path=copied), found)


def re_up(name: str) -> bool:
    return ".lora_B" in name or ".lora_up" in name


def test_what_a_lora_changes_is_said(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_to_end(values(), tmp_path / "run", exports=True)
    said = re.search(
        r"the LoRA: it changes (\d+) of \1 layers, by 0\.0\d+", capsys.readouterr().out
    )
    assert said is not None
    record = record_of(run)
    (norms,) = record.weight_norms.values()
    assert len(norms) == int(said[1])
    assert all(norm > 0 for norm in norms.values())
    train_to_end(values(learning_rate=1e-30), tmp_path / "none", exports=True)
    assert "the LoRA: it changes next to nothing: at most" in capsys.readouterr().out
