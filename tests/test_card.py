"""The model card beside the exports: what it says, what it links to, and whose it is."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import dagster as dg
import pytest
import yaml
from conftest import Values, make_config, train_to_end
from dagster_support import definitions_of, write_recipe
from PIL import Image

from diffsynth_dagster.config.entries import ModelEntry
from diffsynth_dagster.export import chosen_checkpoint, export_run
from diffsynth_dagster.export.card import loss_svg, write_card
from diffsynth_dagster.own_names import is_own
from diffsynth_dagster.run.record import read_record
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.resolved import ResolvedModel

SVG = "{http://www.w3.org/2000/svg}"
HUB = ModelHub(Path(), skip_download=True)
LINK = re.compile(r"\]\(([^)]+)\)")
PROMPT = "a ``` fence | and *stars*"
SAMPLED = {"sample_prompts": [PROMPT], "sample_num_inference_steps": 1, "height": 32, "width": 32}


@pytest.fixture
def run(values: Values, tmp_path: Path) -> Path:
    """The run folder of a finished LoRA training with samples and exports."""
    run = train_to_end(values(**SAMPLED, lora_alpha=8), tmp_path / "my_[run]", exports=True)
    return run


def card_of(run: Path) -> str:
    return (run / "exports" / "README.md").read_text(encoding="utf-8")


def front_matter(card: str) -> dict[str, Any]:
    start, front, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front)


def written(run: Path, given: dict[str, Any], repository: str | None = None) -> Any:
    """A card that is written once more, of a model that comes from a repository."""
    config = make_config({**given, "output_path": str(run)})
    record, found = read_record(run), find_model(config, HUB)
    assert record is not None
    entry = ModelEntry("model_id_with_origin_paths", repository, "transformer/*.safetensors")
    parts = {"dit": replace(found.components["dit"], entry=entry)} if repository else {}
    model: ResolvedModel = replace(found, components={**found.components, **parts})
    chosen = chosen_checkpoint(config, record, found.family)
    return write_card(config, record, model, chosen, export_run(config, record, found))


def test_what_the_card_says_and_links_to(values: Values, run: Path, tiny_qwen: Path) -> None:
    card, record = card_of(run), read_record(run)
    assert record is not None
    assert front_matter(card) == {
        "library_name": "diffusers",
        "tags": ["diffsynth-dagster", "qwen_image", "lora"],
    }
    assert "\n# my\\_\\[run\\]\n" in card
    for line in (
        "- Family: `qwen_image`",
        "- Trained: `dit` through a LoRA (rank 4, alpha 8.0)",
        "- Steps: 2",
        "- Checkpoint: `epoch-0.safetensors`",
        f"- Rows: 8, with the digest `{record.samples_digest}`",
        "- Resolution: 32 × 32 pixels",
        f"- `dit`: `diffusion_pytorch_model.safetensors`, BLAKE3 `{record.base['dit']}`",
        'pipe.load_lora_weights("diffusers/pytorch_lora_weights.safetensors")',
        "ComfyUI: copy `diffusers/pytorch_lora_weights.safetensors` into `models/loras`.",
    ):
        assert f"\n{line}\n" in card
    links = LINK.findall(card)
    assert links == ["../samples/step-2.png", "loss.svg"]
    with Image.open(run / "exports" / links[0]) as picture:
        assert picture.size == (32, 32)
    curve = ElementTree.parse(run / "exports" / links[1]).getroot()
    assert curve.tag.endswith("svg")
    assert len([part for part in curve.iter(f"{SVG}path") if "class" in part.attrib]) == 2
    assert all(is_own(f"exports/{p.name}") for p in (run / "exports").iterdir() if p.is_file())
    # The recipe makes the same training; it names no folder of the machine.
    recipe = re.search(r"\n(````+)yaml\n(.*?)\n\1\n", card, re.S)
    assert recipe is not None
    said = yaml.safe_load(recipe[2])
    assert said["sample_prompts"] == [PROMPT]
    assert (said["lora_rank"], said["dataset_metadata_path"]) == (4, "metadata.csv")
    assert said["model_paths"] == [Path(path).name for path in values()["model_paths"]]
    assert not {"output_path", "cache_path"} & said.keys()
    for folder in (run.parent, tiny_qwen.parent):
        assert str(folder) not in card


def test_equal_trainings_have_equal_cards(values: Values, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / run.name
    train_to_end(values(**SAMPLED, lora_alpha=8), other, exports=True)
    assert card_of(other) == card_of(run)
    assert (other / "exports" / "loss.svg").read_text() == (
        run / "exports" / "loss.svg"
    ).read_text()


def test_a_repository_is_the_base_model(values: Values, run: Path) -> None:
    card = written(run, values(export_formats=["guide", "peft"]), "Qwen/Qwen-Image")
    assert not card.kept
    assert card_of(run) == card.text
    assert front_matter(card.text)["base_model"] == "Qwen/Qwen-Image"
    assert "`Qwen/Qwen-Image:transformer/*.safetensors`" in card.text
    assert "\n### `guide/pytorch_lora_weights.safetensors`\n" in card.text
    others = "it reads `comfyui` or `kohya` or `diffusers` (`export_formats`)."
    assert f"\nComfyUI does not read this format: {others}\n" in card.text
    assert "\nDiffSynth-Studio: `pipe.load_lora(pipe.dit, ...)` with this file.\n" in card.text
    assert "\n### `peft/adapter_model.safetensors`\n" in card.text
    assert 'peft.PeftModel.from_pretrained(pipe.transformer, "peft")' in card.text


def test_a_module_trained_in_full(values: Values, tmp_path: Path) -> None:
    given = values(trainable_models=["dit"])
    run = train_to_end(given, tmp_path / "run", exports=True)
    card = card_of(run)
    assert "full-training" in front_matter(card)["tags"]
    assert "\n- Trained: `dit` in full\n" in card
    assert "## Samples" not in card
    assert (
        'pipe.transformer = diffusers.QwenImageTransformer2DModel.from_pretrained("diffusers/transformer")'
        in card
    )
    # Qwen-Image has the same names everywhere.
    file = "diffusers/transformer/diffusion_pytorch_model.safetensors"
    assert f"\nComfyUI: copy `{file}` into `models/diffusion_models`.\n" in card


def test_an_edited_card_is_kept(
    values: Values, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "exports" / "README.md"
    ours = path.read_text(encoding="utf-8")
    assert not written(run, values(**SAMPLED)).kept, "one of an export before is written anew"
    lines = ours.splitlines(keepends=True)
    edited = [
        ours.replace("## Training", "## My training"),
        ours + "more\n",
        "".join(lines[:-1]),
        "mine\n" + lines[-1],
        "my own",
        "",
    ]
    for text in edited:
        path.write_text(text, encoding="utf-8")
        assert written(run, values(**SAMPLED)).kept
        assert path.read_text(encoding="utf-8") == text
    path.write_bytes(b"\xff\xfe")
    capsys.readouterr()
    train_to_end(values(**SAMPLED, lora_alpha=8), run, exports=True)
    assert capsys.readouterr().out.count(f"{path} was edited, and stays as it is") == 1
    assert path.read_bytes() == b"\xff\xfe"
    path.unlink()
    assert not written(run, values(**SAMPLED)).kept
    assert card_of(run) == ours


def test_damaged_pictures_and_losses_are_not_shown(values: Values, run: Path) -> None:
    (run / "samples" / "step-2.png").write_bytes(b"other")
    (run / "metrics.csv").write_text("step,loss\n1,9\n")
    assert LINK.findall(written(run, values(**SAMPLED)).text) == []


def test_the_card_is_shown_in_dagster(values: Values, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_to_end(values(**SAMPLED), run)
    write_recipe(tmp_path / "recipes", "tiny", {**values(**SAMPLED), "output_path": str(run)})
    key = dg.AssetKey(["tiny", "exports"])
    with dg.DagsterInstance.ephemeral() as instance:
        job = definitions_of(tmp_path / "recipes").resolve_job_def("train_tiny")
        result = job.execute_in_process(instance=instance, asset_selection=[key])
    (event,) = result.asset_materializations_for_node("tiny__exports")
    assert event.metadata["card_file"].value == str(run / "exports" / "README.md")
    shown = str(event.metadata["card"].value)
    assert shown.startswith("# run\n")
    assert "pipe.load_lora_weights(" in shown
    assert "](" not in shown
    assert "<!--" not in shown


def test_the_curve_of_any_losses(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.csv"
    assert loss_svg(tmp_path) is None
    metrics.write_text("step,loss,seconds\n1,nan,1\n2,inf,1\n")
    assert loss_svg(tmp_path) is None
    # One step; equal losses, a line that was cut off; very many steps.
    many = "".join(f"{step},{1 / step},1\n" for step in range(1, 50_001))
    for rows, last in (("7,0.5,1\n", "7"), ("1,3,1\n2,3,1\n3", "2"), (many, "50,000")):
        metrics.write_text("step,loss,seconds\n" + rows)
        text = loss_svg(tmp_path)
        assert text is not None
        assert len(text) < 30_000
        root = ElementTree.fromstring(text)
        words = [part.text for part in root.iter(f"{SVG}text")]
        assert last in words
        assert {"step", "loss", "each step"} <= set(words)
        width, height = float(root.attrib["width"]), float(root.attrib["height"])
        lines = [part.attrib["d"] for part in root.iter(f"{SVG}path") if "class" in part.attrib]
        assert len(lines) == 2
        for line in lines:
            places = [tuple(map(float, point.split())) for point in line[1:].split("L")]
            assert all(0 <= x <= width and 0 <= y <= height for x, y in places)
    # The last, smoothed, falls: y grows downwards.
    heights = [y for _, y in places]
    assert heights == sorted(heights)
