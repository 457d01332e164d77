"""What the table of families does not show of Qwen-Image-Edit: full sizes, and what is refused."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from conftest import make_config, write_qwen
from diffusers import AutoencoderKLQwenImage
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from families.qwen_image.cases import CASES, PUBLISHED_AREAS
from PIL import Image

from diffsynth_dagster.cache.keys import Keys
from diffsynth_dagster.cache.layout import LAYOUT_VERSION
from diffsynth_dagster.cache.manifest import Notes, write_manifest
from diffsynth_dagster.cache.plan_samples import plan_samples
from diffsynth_dagster.cache.row_sets import needed_beside_prompt
from diffsynth_dagster.cache.split import with_settled
from diffsynth_dagster.config.affects import settled_by_encoding
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.geometry import area_size
from diffsynth_dagster.data.prepare import prepare_data
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.facts import FactCache
from diffsynth_dagster.families import find_family
from diffsynth_dagster.families.qwen_image import edit
from diffsynth_dagster.families.qwen_image.edit import PROCESSOR, resized, shown
from diffsynth_dagster.families.qwen_image.family import FAMILY
from diffsynth_dagster.preflight import Known, refuse_family_specific
from diffsynth_dagster.run.start import config_digest
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.resolved import as_used, resolve

AREA, SHOWN_AREA = PUBLISHED_AREAS["AREA"], PUBLISHED_AREAS["SHOWN_AREA"]
SIZES = [(512, 512), (1920, 1080), (1080, 1920), (333, 777), (4000, 300), (1365, 1024), (97, 61)]


@pytest.fixture(autouse=True)
def published_areas(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, area in PUBLISHED_AREAS.items():
        monkeypatch.setattr(edit, name, area)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_sizes_at_the_published_area(width: int, height: int) -> None:
    plain, plus = pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
    assert AREA == plus.VAE_IMAGE_SIZE
    assert SHOWN_AREA == plus.CONDITION_IMAGE_SIZE
    for area in (AREA, SHOWN_AREA):
        ours = area_size(width, height, area)
        assert ours == plain.calculate_dimensions(area, width / height)[:2]
        assert ours == plus.calculate_dimensions(area, width / height)


def test_pictures_are_resized_as_the_pipelines_do() -> None:
    source = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (300, 450, 3), generator=source, dtype=torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    width, height = area_size(450, 300, SHOWN_AREA)
    theirs = VaeImageProcessor(vae_scale_factor=16).resize(picture, height, width)
    assert resized(picture, SHOWN_AREA).tobytes() == theirs.tobytes()


def test_a_row_is_shown_as_its_release_does() -> None:
    """One picture at the VAE's size and without a name; several smaller, and called by number."""
    picture = Image.new("RGB", (512, 512))
    block = "<|vision_start|><|image_pad|><|vision_end|>"
    text, pictures = shown([picture], later=False)
    assert (text, [p.size for p in pictures]) == (block, [(1024, 1024)])
    text, pictures = shown([picture], later=True)
    assert (text, [p.size for p in pictures]) == (f"Picture 1: {block}", [(384, 384)])
    text, pictures = shown([picture] * 2, later=False)
    assert text == f"Picture 1: {block}Picture 2: {block}"
    assert [p.size for p in pictures] == [(384, 384)] * 2


def test_the_published_processor_is_read(tmp_path: Path) -> None:
    """Its class there is another one, which needs torchvision; its numbers are what counts."""
    (tmp_path / "preprocessor_config.json").write_text(
        '{"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2,'
        ' "merge_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073],'
        ' "image_std": [0.26862954, 0.26130258, 0.27577711],'
        ' "image_processor_type": "Qwen2VLImageProcessorFast",'
        ' "processor_class": "Qwen2_5_VLProcessor"}',
        encoding="utf-8",
    )
    read = PROCESSOR.load(str(tmp_path))
    assert type(read).__name__ == "Qwen2VLImageProcessorPil"
    assert (read.size["shortest_edge"], read.size["longest_edge"]) == (3136, 12845056)
    (grid,) = read(images=[Image.new("RGB", (384, 384))], return_tensors="pt")["image_grid_thw"]
    assert grid.tolist() == [1, 28, 28]


def made(**values: Any) -> TrainingConfig:
    base = {
        "family": "qwen_image",
        "dataset_base_path": "data",
        "dataset_metadata_path": "data/metadata.csv",
        "model_paths": ["dit.safetensors"],
        "trainable_models": "dit",
    }
    return make_config({**base, **values})


def used(**values: Any) -> Any:
    return as_used(FAMILY, made(**values), {})


@pytest.mark.parametrize(
    "values",
    [
        {"processor_path": "a"},
        {"zero_cond_t": True},
        {"edit_plus": True},
        {"data_file_keys": "image,edit_image"},
    ],
    ids=lambda values: next(iter(values)),
)
def test_what_is_about_edit_images_is_refused_without_them(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(ParameterError, match=f"{name} is about edit images") as error:
        used(**values)
    assert "name 'edit_image' in extra_inputs and data_file_keys" in str(error.value)


def test_each_use_has_its_own_keys_of_the_store() -> None:
    """The prompt of a single picture is encoded in two ways, by flag or name."""
    edit = {"extra_inputs": "edit_image", "data_file_keys": "image,edit_image"}
    first = {"edit_prompt", "image", "edit_image"}
    later = {"edit_prompt_later", "image", "edit_image"}
    for values, stages in (
        ({}, {"prompt", "image"}),
        ({**edit, "edit_plus": False}, first),
        ({**edit, "zero_cond_t": True}, later),
        ({**edit, "edit_plus": True}, later),
        ({**edit, "model_id_with_origin_paths": "Qwen/Qwen-Image-Edit:a/*"}, first),
        ({**edit, "model_id_with_origin_paths": "Qwen/Qwen-Image-Edit-2509:a/*"}, later),
    ):
        assert {stage.name for stage in used(**values).stages} == stages


EDITS = {"extra_inputs": "edit_image", "data_file_keys": "image,edit_image"}
LATER_ONES = (
    "models/FireRedTeam/FireRed-Image-Edit-1.1/transformer/diffusion_pytorch_model.safetensors",
    "models/Qwen-Image-Edit-2509/transformer/",
    "models/qwen_image_edit_2511_bf16.safetensors",
)
FIRST_ONES = (
    "models/Qwen/Qwen-Image-Edit/transformer/*.safetensors",
    "models/qwen_image_edit_fp8_e4m3fn.safetensors",
)
UNKNOWN_ONES = (
    "models/edit/transformer.safetensors",
    "Qwen-Image-Edit-mine/transformer/model.safetensors",
    "Qwen-Image-Edit/project/models/dit/model.safetensors",
)


@pytest.mark.parametrize("path", [*LATER_ONES, *FIRST_ONES, *UNKNOWN_ONES])
def test_the_name_of_a_local_transformer_says_its_release_or_it_is_asked_for(path: str) -> None:
    models = {"model_paths": [path, "Qwen-Image-Edit/text_encoder/model.safetensors"], **EDITS}
    if path not in UNKNOWN_ONES:
        stage = "edit_prompt_later" if path in LATER_ONES else "edit_prompt"
        assert stage in {stage.name for stage in used(**models).stages}
        return
    with pytest.raises(ParameterError, match="not clear which release") as error:
        used(**models)
    assert "edit_plus: true (--edit_plus)" in str(error.value)
    for plus, name in ((True, "edit_prompt_later"), (False, "edit_prompt")):
        assert name in {stage.name for stage in used(**models, edit_plus=plus).stages}


@pytest.mark.parametrize(
    ("file", "settings", "stage"),
    [
        ("model_index.json", {"_class_name": "QwenImageEditPlusPipeline"}, "edit_prompt_later"),
        ("model_index.json", {"_class_name": "QwenImageEditPipeline"}, "edit_prompt"),
        ("transformer/config.json", {"zero_cond_t": True}, "edit_prompt_later"),
    ],
)
def test_what_is_published_beside_a_local_transformer_says_its_release(
    file: str, settings: dict[str, Any], stage: str, tmp_path: Path
) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / file).write_text(json.dumps(settings), encoding="utf-8")
    family = used(model_paths=[str(tmp_path / "transformer" / "model.safetensors")], **EDITS)
    assert stage in {stage.name for stage in family.stages}


@pytest.mark.parametrize(
    ("models", "stage"),
    [
        (["Qwen-Image-Edit/transformer/*", "Qwen-Image-Edit-2509/vae/*"], "edit_prompt"),
        (["qwen_image_edit_2509.safetensors", "Qwen-Image-Edit/vae"], "edit_prompt_later"),
        (["Qwen-Image-Edit-2509/text_encoder/*", "Qwen-Image-Edit-2509/vae"], "edit_prompt_later"),
        (["a/my-qwen-edit/diffusion_pytorch_model.safetensors", "Qwen-Image-Edit/vae"], None),
        (["a/my-tuned.safetensors", "Qwen-Image-Edit-2509/text_encoder/"], None),
        (["my.safetensors", "Qwen-Image-Edit-2509/split/qwen_2.5_vl_7b.safetensors"], None),
        (["Qwen-Image-Edit/text_encoder/*", "Qwen-Image-Edit/vae/"], None),
    ],
)
@pytest.mark.parametrize("local", [True, False])
def test_models_that_encode_are_asked_only_where_no_transformer_is_listed(
    models: list[str], stage: str | None, local: bool
) -> None:
    if not local:
        named = [m for m in models if m.startswith("Qwen-Image-Edit")]
        hub = [f"Qwen/{m.replace('/', ':', 1)}" for m in named]
        rest = [m for m in models if m not in named]
        given = {"model_paths": rest, "model_id_with_origin_paths": hub}
    else:
        given = {"model_paths": models}
    if stage is None:
        with pytest.raises(ParameterError, match="not clear which release"):
            used(**given, **EDITS)
        return
    assert stage in {each.name for each in used(**given, **EDITS).stages}


@pytest.mark.parametrize(
    "values",
    [
        {"model_id_with_origin_paths": "Qwen/Qwen-Image-Edit-2509:transformer/*"},
        {"zero_cond_t": True},
    ],
)
def test_a_switch_that_the_names_overrule_is_said(values: dict[str, Any]) -> None:
    """And not refused: every config.yaml of before says `edit_plus: false` where it was left out."""
    family = used(**EDITS, **values, edit_plus=False)
    assert "edit_prompt_later" in {stage.name for stage in family.stages}
    (warning,) = family.warnings
    assert warning.startswith("edit_plus: false has no effect")
    assert not used(**EDITS, **values).warnings
    assert not used(**EDITS, edit_plus=False).warnings


TUNED = {"model_paths": ["/models/my-tuned.safetensors"], "task": "sft:train"}


@pytest.mark.parametrize("settled", [False, True])
def test_the_second_half_shows_edit_images_as_the_first_did(settled: bool, tmp_path: Path) -> None:
    """The manifest of a first half that went by names says `edit_plus: false`, as it did before."""
    second = {**TUNED, "dataset_base_path": str(tmp_path), "dataset_metadata_path": None}

    def as_second(stages: list[str], said: bool, **more: Any) -> tuple[Any, Any]:
        notes = Notes(
            store="s",
            family="qwen_image",
            digest="d",
            samples=1,
            stages=dict.fromkeys(stages, "v"),
            parameters={"edit_plus": said, "extra_inputs": ["edit_image"]},
            layout=LAYOUT_VERSION,
        )
        write_manifest(pl.LazyFrame({"row": [1]}), notes, tmp_path / "samples.parquet")
        config = with_settled(made(**second, **more))
        return config, as_used(FAMILY, config, {})

    later, first = ["edit_prompt_later", "edit_image"], ["edit_prompt", "edit_image"]
    for more in ({}, {"edit_plus": True}):
        _, family = as_second(later, settled, **more)
        assert "edit_prompt_later" in {stage.name for stage in family.stages}
    left_out, _ = as_second(later, settled)
    assert settled_by_encoding(left_out)["edit_plus"] is settled, "its identity is that of before"
    _, family = as_second(first, False)
    assert "edit_prompt" in {stage.name for stage in family.stages}
    with pytest.raises(ParameterError, match=r"encoded (as the first release|with edit_plus = F)"):
        as_second(first, False, edit_plus=True)
    with pytest.raises(ParameterError, match=r"encoded (as the later releases|with edit_plus = T)"):
        as_second(later, settled, edit_plus=False)
    with pytest.raises(ParameterError, match="not clear which release"):
        as_second(["edit_image"], False)  # the text encoder is trained: the step shows them


def test_a_release_that_is_left_out_counts_as_the_switch_that_was_off() -> None:
    """So that no training, table or store of before there was a third answer is out of date."""
    base = {"dataset_base_path": "d", "dataset_metadata_path": "m.csv", "model_paths": ["a"]}
    base |= {"lora_base_model": "dit"}
    one, other = (make_config({**base, **more}) for more in ({}, {"edit_plus": False}))
    assert (one.edit_plus, other.edit_plus) == (None, False)
    assert settled_by_encoding(one) == settled_by_encoding(other)
    assert settled_by_encoding(one)["edit_plus"] is False
    assert config_digest(one) == config_digest(other)
    for family in ("flux", "qwen_image"):
        used = as_used(find_family(family), other, {})
        refuse_family_specific(Known(other, resolve(other, used)))


def test_the_reference_keeps_its_area_whatever_the_image_is_bounded_to() -> None:
    """1248x832 for 900x600."""
    for pixels in (1048576, 262144, 65536):
        family = used(**EDITS, edit_plus=True, max_pixels=pixels)
        (area,) = (i.area for i in family.inputs if i.column == "edit_image")
        assert area is not None
        assert area_size(900, 600, area) == (1248, 832)


@pytest.mark.soak
def test_the_reference_has_the_published_tokens(tmp_path: Path) -> None:
    """4056 for 900x600, in patches of 16x16. DiffSynth-Studio gives as many."""
    folder = write_qwen(tmp_path) / "vae"
    sample = {"edit_image": [Image.new("RGB", (900, 600), "red")]}
    family = used(**EDITS, edit_plus=True, max_pixels=65536)
    vae = AutoencoderKLQwenImage.from_pretrained(folder)
    with torch.no_grad():
        (made,) = family.stage("edit_image").run({"vae": vae}, [sample])
    assert made["edit_grids"].tolist() == [[52, 78]]
    assert made["edit_tokens"].shape[0] == 4056


def test_max_pixels_changes_no_key_of_what_is_made_of_the_reference(tmp_path: Path) -> None:
    (case,) = (case for case in CASES if case.name == "qwen_image_edit")
    case.write(tmp_path / "model")
    table = case.rows(tmp_path / "data")
    values = {
        "family": "qwen_image",
        "dataset_base_path": str(table.parent),
        "dataset_metadata_path": str(table),
        "lora_base_model": "dit",
        "output_path": str(tmp_path / "run"),
        **case.models(tmp_path / "model", "diffusers"),
        **case.parameters,
    }
    planned: list[pl.DataFrame] = []
    for pixels in (1048576, 256):
        config = make_config({**values, "max_pixels": pixels})
        found = find_model(config, ModelHub(tmp_path, skip_download=True))
        with closing(FactCache(tmp_path / "facts.sqlite")) as facts:
            checked = prepare_data(config, found.family.columns, facts)
            keys = Keys(found, facts, torch.float32)
            planned.append(plan_samples(config, found, checked, keys).frame)
    one, other = planned
    same = {n for n in one.columns if n.startswith("key:") and one[n].equals(other[n])}
    assert same == {"key:edit_image", "key:edit_prompt"}
    assert not one["key:image"].equals(other["key:image"])


def test_the_first_file_column_is_the_image() -> None:
    """Its size is that of the sample."""
    family = used(**EDITS, edit_plus=True)
    assert [item.column for item in family.file_inputs] == ["image", "edit_image"]
    assert needed_beside_prompt(family) == ["edit_image"]
