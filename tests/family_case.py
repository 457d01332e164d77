"""A row of the test table of families: a tiny model with random weights, and its data."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffsynth_dagster.families.contract import Tensors
from diffsynth_dagster.families.shared.packing import pack, unpack


@dataclass(frozen=True)
class Case:
    """A variant of a family.

    Attributes:
        name: name of the case.
        family: name of the family.
        write: writes the tiny model with float32 weights below a folder: `diffusers/` in the layout
            of the published pipeline, `original/` as the single files of the authors (if there are
            any). Called once for all cases with the same `write`.
        layouts: layout → the parameters that name its files, `model_paths` and tokenizers, with
            paths relative to the model's folder. The layout "original" has no config.json.
        rows: writes four rows of data, with captions of different lengths and all of one size, and
            their metadata into a folder; returns the metadata file.
        parameters: parameters of a training besides models, data and LoRA: sizes, columns, flags.
        targets: LoRA targets by the names of diffusers.
        aliases: the same layers by the names that other tools use.
        published: (the model's folder, the row's columns with absolute paths, x_t of one sample by
            target, LoRA file or None) → what diffusers' own pipeline, loaded from `diffusers/`,
            predicts from x_t for this row, by target and without batch dimension, and the timestep
            in [0, 1000] of this prediction.
        base: the component that the LoRA is for.
        decoders: model files that only sample images need, relative to the model's folder.
    """

    name: str
    family: str
    write: Callable[[Path], None]
    layouts: Mapping[str, Mapping[str, Any]]
    rows: Callable[[Path], Path]
    parameters: Mapping[str, Any]
    targets: tuple[str, ...]
    aliases: tuple[str, ...]
    published: Callable[[Path, Mapping[str, Any], Tensors, Path | None], tuple[Tensors, float]]
    base: str = "dit"
    decoders: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def models(self, folder: Path, layout: str) -> dict[str, Any]:
        """The parameters that name the model's files."""
        named: dict[str, Any] = {}
        for name, value in self.layouts[layout].items():
            if isinstance(value, str):
                named[name] = str(folder / value)
            else:
                named[name] = [
                    str(folder / item)
                    if isinstance(item, str)
                    else [str(folder / part) for part in item]
                    for item in value
                ]
        return named


@contextmanager
def first_call(module: nn.Module) -> Iterator[dict[str, Any]]:
    """While the block runs, record the first call of a module: `args`, `kwargs`, `output`."""
    seen: dict[str, Any] = {}

    def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not seen:
            tensor = output[0] if isinstance(output, tuple) else output.sample
            seen.update(args=args, kwargs=kwargs, output=tensor.detach().clone())

    hook = module.register_forward_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def first_prediction(
    pipeline: Any, x_t: Tensors, lora: Path | None, **arguments: Any
) -> tuple[Tensors, float]:
    """The prediction of an image pipeline's transformer in its first step, and the timestep.

    Args:
        x_t: the noisy latents, (C, H, W), by target.
        arguments: further arguments of the pipeline's call.
    """
    if lora is not None:
        pipeline.load_lora_weights(lora)
    pipeline.set_progress_bar_config(disable=True)
    latents = x_t["image"]
    height, width = latents.shape[-2:]
    with first_call(pipeline.transformer) as seen, torch.no_grad():
        pipeline(
            latents=pack(latents[None]),
            height=height * 8,
            width=width * 8,
            num_inference_steps=2,
            output_type="latent",
            **arguments,
        )
    timestep = float(seen["kwargs"]["timestep"][0]) * 1000
    # Behind the latents' tokens, the output may hold those of input images.
    return {"image": unpack(seen["output"][:, : height * width // 4], height, width)[0]}, timestep
