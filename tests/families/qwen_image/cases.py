"""Qwen-Image and its editing variants, tiny."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from conftest import write_images, write_qwen
from diffusers import (
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from family_case import Case, first_prediction
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)

from diffsynth_dagster.families.contract import Tensors
from diffsynth_dagster.families.qwen_image import edit
from diffsynth_dagster.families.qwen_image.family import SCHEDULER
from diffsynth_dagster.families.shared.packing import unpack

AREA = 64 * 64
"""Of edit images here, in pixels."""
PUBLISHED_AREAS = {"AREA": edit.AREA, "SHOWN_AREA": edit.SHOWN_AREA}
"""Of the published pipelines: minutes on a CPU. Ours are made small for every test that reads this
module, and those of the pipelines where one is asked; `test_qwen_edit.py` has the real ones."""
edit.AREA = edit.SHOWN_AREA = AREA


def write(folder: Path) -> None:
    """The text encoder has the names of the published files in `diffusers/` (this is how
    transformers saves it) and those of its module in `original/`."""
    own = write_qwen(folder / "diffusers")
    original = folder / "original"
    original.mkdir()
    for name in ("transformer", "vae"):
        file = own / name / "diffusion_pytorch_model.safetensors"
        shutil.copy(file, original / f"{name}.safetensors")
    encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(own / "text_encoder")
    save_file(encoder.state_dict(), original / "text_encoder.safetensors")


LAYOUTS: dict[str, dict[str, Any]] = {
    "diffusers": {
        "model_paths": [
            "diffusers/transformer/diffusion_pytorch_model.safetensors",
            "diffusers/text_encoder/model.safetensors",
            "diffusers/vae/diffusion_pytorch_model.safetensors",
        ],
        "tokenizer_path": "diffusers/tokenizer",
    },
    "original": {
        "model_paths": [
            "original/transformer.safetensors",
            "original/text_encoder.safetensors",
            "original/vae.safetensors",
        ],
        "tokenizer_path": "diffusers/tokenizer",
    },
}
EDIT_LAYOUTS = {
    name: {**files, "processor_path": "diffusers/processor"} for name, files in LAYOUTS.items()
}


def rows(folder: Path) -> Path:
    return write_images(folder, 4) / "metadata.csv"


def write_pictures(folder: Path, count: int, size: tuple[int, int]) -> list[str]:
    """Pictures of random colours; returns their names."""
    source = torch.Generator().manual_seed(sum(size))
    names = [f"edit_{size[0]}x{size[1]}_{index}.png" for index in range(count)]
    for name in names:
        coarse = torch.randint(0, 255, (4, 4, 3), generator=source, dtype=torch.uint8)
        Image.fromarray(coarse.numpy()).resize(size).save(folder / name)
    return names


def rows_with_one(folder: Path) -> Path:
    """An edit image of another size and aspect than the image in each row, in a csv."""
    table = rows(folder)
    head, *lines = table.read_text(encoding="utf-8").splitlines()
    names = write_pictures(folder, 4, (90, 60))
    joined = [f"{line},{name}" for line, name in zip(lines, names, strict=True)]
    table.write_text("\n".join([f"{head},edit_image", *joined]) + "\n", encoding="utf-8")
    return table


def rows_with_three(folder: Path) -> Path:
    """Three edit images of different sizes in each row, in a json."""
    write_images(folder, 4)
    columns = [write_pictures(folder, 4, size) for size in ((90, 60), (50, 120), (64, 64))]
    table = folder / "metadata.json"
    listed = [
        {
            "image": f"{index}.png",
            "prompt": f"{'x' * index} of {index}",
            "edit_image": [names[index] for names in columns],
        }
        for index in range(4)
    ]
    table.write_text(json.dumps(listed), encoding="utf-8")
    return table


def parts(folder: Path, **transformer: Any) -> dict[str, Any]:
    """What `QwenImagePipeline` is made of."""
    own = folder / "diffusers"
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER),
        "vae": AutoencoderKLQwenImage.from_pretrained(own / "vae"),
        "text_encoder": Qwen2_5_VLForConditionalGeneration.from_pretrained(own / "text_encoder"),
        "tokenizer": Qwen2Tokenizer.from_pretrained(own / "tokenizer"),
        "transformer": QwenImageTransformer2DModel.from_pretrained(
            own / "transformer", **transformer
        ),
    }


def processor(folder: Path) -> Qwen2VLProcessor:
    """That of the edit pipelines. Videos, which it never sees here, need torchvision."""
    own = folder / "diffusers"
    with mock.patch.object(Qwen2VLProcessor, "check_argument_for_proper_class"):
        return Qwen2VLProcessor(
            image_processor=Qwen2VLImageProcessorPil.from_pretrained(own / "processor"),
            tokenizer=Qwen2Tokenizer.from_pretrained(own / "tokenizer"),
        )


def count_template(pipeline: Any) -> None:
    """Drop as many template tokens as there are: the published number is that of a tokenizer that
    ours is not."""
    start = pipeline.prompt_template_encode.split("{}")[0].split("<|vision_start|>")[0]
    pipeline.prompt_template_encode_start_idx = len(pipeline.tokenizer(start).input_ids)
    pipeline.set_progress_bar_config(disable=True)


def predicted(
    pipeline: DiffusionPipeline, row: Mapping[str, Any], x_t: Tensors, lora: Path | None
) -> tuple[Tensors, float]:
    """What a pipeline's transformer is called with first, and what it predicts."""
    count_template(pipeline)
    return first_prediction(pipeline, x_t, lora, **row, true_cfg_scale=1.0)


def published(
    folder: Path, row: Mapping[str, Any], x_t: Tensors, lora: Path | None
) -> tuple[Tensors, float]:
    return predicted(QwenImagePipeline(**parts(folder)), {"prompt": row["prompt"]}, x_t, lora)


def sampled(folder: Path, row: Mapping[str, Any]) -> Tensors:
    """The latents of the image that the pipeline makes of a row for distillation."""
    pipeline: Any = QwenImagePipeline(**parts(folder))
    count_template(pipeline)
    with Image.open(row["image"]) as image:
        width, height = image.size
    tokens = pipeline(
        prompt=row["prompt"],
        generator=torch.Generator(row["rand_device"]).manual_seed(row["seed"]),
        height=height,
        width=width,
        num_inference_steps=row["num_inference_steps"],
        true_cfg_scale=1.0,
        output_type="latent",
    ).images
    return {"image": unpack(tokens, height // 8, width // 8)[0]}


@contextmanager
def at_small_area() -> Iterator[None]:
    """The edit pipelines with edit images of `AREA` pixels instead of 1024 x 1024."""
    plain = pipeline_qwenimage_edit.calculate_dimensions
    plus = pipeline_qwenimage_edit_plus

    def small(area: int, ratio: float) -> tuple[int, int, None]:
        return plain(min(area, AREA), ratio)

    with (
        mock.patch.object(pipeline_qwenimage_edit, "calculate_dimensions", small),
        mock.patch.object(plus, "VAE_IMAGE_SIZE", AREA),
        mock.patch.object(plus, "CONDITION_IMAGE_SIZE", AREA),
    ):
        yield


def with_token_types(encoder: torch.nn.Module) -> None:
    """Hand `mm_token_type_ids` over to the text encoder, as transformers 5 wants it.

    The pipelines do not (huggingface/diffusers#14194): without it the tokens of a picture have the
    positions of a text, which is not how the published models were trained.
    """

    def add(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        kwargs["mm_token_type_ids"] = (kwargs["input_ids"] == module.config.image_token_id).int()
        return args, kwargs

    encoder.register_forward_pre_hook(add, with_kwargs=True)


def published_edit(
    kind: type[DiffusionPipeline], **transformer: Any
) -> Callable[[Path, Mapping[str, Any], Tensors, Path | None], tuple[Tensors, float]]:
    def run(
        folder: Path, row: Mapping[str, Any], x_t: Tensors, lora: Path | None
    ) -> tuple[Tensors, float]:
        make: Any = kind
        pipeline = make(**parts(folder, **transformer), processor=processor(folder))
        with_token_types(pipeline.text_encoder)
        opened = [Image.open(path).convert("RGB") for path in row["edit_image"]]
        images: Sequence[Image.Image] | Image.Image = opened if len(opened) > 1 else opened[0]
        with at_small_area():
            return predicted(pipeline, {"prompt": row["prompt"], "image": images}, x_t, lora)

    return run


EDIT = {
    "family": "qwen_image",
    "write": write,
    "layouts": EDIT_LAYOUTS,
    "targets": ("to_q", "to_v"),
    "aliases": ("to_q", "to_v"),
}
EDIT_PARAMETERS = {
    "data_file_keys": "image,edit_image",
    "extra_inputs": "edit_image",
}
CASES = (
    Case(
        name="qwen_image",
        family="qwen_image",
        write=write,
        layouts=LAYOUTS,
        rows=rows,
        parameters={"height": 32, "width": 32},
        targets=("to_q", "to_v"),
        aliases=("to_q", "to_v"),
        published=published,
    ),
    Case(
        name="qwen_image_edit",
        rows=rows_with_one,
        parameters={**EDIT_PARAMETERS, "edit_plus": False},
        published=published_edit(QwenImageEditPipeline),
        **EDIT,
    ),
    Case(
        name="qwen_image_edit_plus",
        rows=rows_with_three,
        parameters={**EDIT_PARAMETERS, "edit_plus": True},
        published=published_edit(QwenImageEditPlusPipeline),
        **EDIT,
    ),
    Case(
        name="qwen_image_edit_zero_cond_t",
        rows=rows_with_one,
        parameters={**EDIT_PARAMETERS, "zero_cond_t": True},
        published=published_edit(QwenImageEditPlusPipeline, zero_cond_t=True),
        **EDIT,
    ),
)
