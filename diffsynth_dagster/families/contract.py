"""What a model family declares. Everything else is shared and never asks which family it serves.

A family is data and a few pure functions: how its files are recognised and built, the stages that
turn a row of the data set into tensors, the noising path, and one call of its denoiser.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from diffsynth_dagster.data.geometry import Geometry
from diffsynth_dagster.objective.flow import FlowPath
from diffsynth_dagster.weights.header import Header

Tensors = dict[str, torch.Tensor]
Loaded = Mapping[str, Any]
"""Component name → the module or tokenizer that was loaded."""


@dataclass(frozen=True)
class Component:
    """A module of the model that has weights of its own.

    Attributes:
        name: what `trainable_models` and `lora_base_model` call it (`dit`, `vae`, …).
        folder: its folder in the diffusers layout, which is also its prefix in diffusers' LoRAs.
        signatures: one for each accepted layout: tensor names that all stand in its files and in
            no other component's.
        build: (header, config.json or None) → the module, from the config or else from the shapes.
        convert: tensors of any accepted layout → the names (and tensors) of the built module.
            Works on meta tensors too.
        optional: whether a training can do without it.
    """

    name: str
    folder: str
    signatures: tuple[tuple[str, ...], ...]
    build: Callable[[Header, Mapping[str, Any] | None], nn.Module]
    convert: Callable[[Tensors], Tensors] = field(default=lambda tensors: tensors)
    optional: bool = False


@dataclass(frozen=True)
class Tokenizer:
    """Files that turn text into tokens: no weights, but part of what a cached sample depends on.

    Attributes:
        name: key in `Loaded`.
        parameter: the parameter that names its folder.
        default: `repository:folder/` on ModelScope where the parameter is left out and no folder
            of this name lies beside the model files.
        load: folder → tokenizer.
    """

    name: str
    parameter: str
    default: str
    load: Callable[[str], Any]


@dataclass(frozen=True)
class Input:
    """A column of the metadata that a stage reads.

    Attributes:
        kind: "text" is handed over as str; "image" as float32 (3, H, W) in [-1, 1]; "video" as
            float32 (3, F, H, W) in [-1, 1]. Every file has the trained size of its own; the first
            file column of a family tells the size of the sample.
        many: files only: a row may name several. They are handed over as a list of tensors, and a
            row that names one gives a list of one.
    """

    column: str
    kind: Literal["text", "image", "video"]
    many: bool = False


@dataclass(frozen=True)
class Output:
    """A tensor that a stage yields for a sample.

    Attributes:
        name: unique in the family.
        role: "target": clean latents that are noised and predicted; "condition": handed to
            `denoise`; "known": mask of the elements of the target called `of` that are given,
            not predicted (1 = known): there x_t = x_0 and the loss does not count.
        ragged: the first dimension differs between samples: a batch is padded with zeros and gets
            a boolean mask (B, L) under the name + "_mask".
        of: the target that a mask belongs to.
    """

    name: str
    role: Literal["target", "condition", "known"]
    ragged: bool = False
    of: str | None = None


Sample = Mapping[str, Any]
"""Inputs of one sample: column → value, and output name → tensor of the stages upstream."""


@dataclass(frozen=True)
class Stage:
    """A named step from a sample's inputs to tensors.

    It is cached when neither it nor a stage it needs uses a component that is trained; otherwise
    it runs inside the training step.

    Attributes:
        run: (loaded components, samples of equal shape) → for each sample its outputs, on the
            device of the component. Must give each sample the tensors that it would get alone.
        version: raised when `run` yields something else for the same inputs.
        needs: stages whose outputs it reads.
    """

    name: str
    reads: tuple[Input, ...]
    uses: tuple[str, ...]
    yields: tuple[Output, ...]
    run: Callable[[Loaded, Sequence[Sample]], list[Tensors]]
    version: int = 1
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class SampleRequest:
    """Images to make with the model as it stands, one for each prompt.

    `conditions` are the stacked outputs of the stages that read nothing but text, and `negative`
    the same for the empty prompt when cfg_scale is above 1.
    """

    conditions: Tensors
    negative: Tensors | None
    height: int
    width: int
    num_inference_steps: int
    cfg_scale: float
    generators: list[torch.Generator]


@dataclass(frozen=True)
class Family:
    """A model family. See `families/qwen_image.py` for the example to copy.

    Attributes:
        denoiser: the component whose prediction is trained.
        denoise: (loaded components, conditions, x_t by target, t (B,) in [0, 1000]) → prediction
            by target.
        path: makes the noising path.
        sample: (loaded components, request) → images, through the family's own diffusers pipeline.
        load_lora: (meta module of the denoiser, LoRA tensors, header metadata): loads an exported
            LoRA the way the family's diffusers pipeline does; raises what that raises.
        lora_targets: component → the layers that get a LoRA when none are named.
        decoder: components that `sample` needs and no stage of the text uses.
        repositories: how the family's repositories are called on the hub, to tell the family of a
            command line before any file is there.
    """

    name: str
    components: tuple[Component, ...]
    tokenizers: tuple[Tokenizer, ...]
    stages: tuple[Stage, ...]
    denoiser: str
    denoise: Callable[[Loaded, Tensors, Tensors, torch.Tensor], Tensors]
    path: Callable[[], FlowPath]
    geometry: Geometry
    sample: Callable[[Loaded, SampleRequest], list[Any]]
    load_lora: Callable[[nn.Module, Tensors, Mapping[str, Any]], None]
    lora_targets: Mapping[str, tuple[str, ...]]
    decoder: tuple[str, ...] = ("vae",)
    repositories: tuple[str, ...] = ()

    def component(self, name: str) -> Component:
        """The component of this name (which exists)."""
        return next(c for c in self.components if c.name == name)

    def stage(self, name: str) -> Stage:
        """The stage of this name (which exists)."""
        return next(s for s in self.stages if s.name == name)

    def cached_stages(self, trained: frozenset[str]) -> tuple[Stage, ...]:
        """The stages that use, themselves and upstream, nothing that is trained."""
        cached: list[Stage] = []
        names: set[str] = set()
        for stage in self.stages:
            if trained.isdisjoint(stage.uses) and names.issuperset(stage.needs):
                cached.append(stage)
                names.add(stage.name)
        return tuple(cached)

    def step_stages(self, trained: frozenset[str]) -> tuple[Stage, ...]:
        """The stages that run inside the training step."""
        cached = self.cached_stages(trained)
        return tuple(stage for stage in self.stages if stage not in cached)

    @property
    def text_stages(self) -> tuple[Stage, ...]:
        """The stages that a prompt alone is enough for."""
        return tuple(s for s in self.stages if all(i.kind == "text" for i in s.reads))

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Every column that a stage reads, once."""
        return tuple(dict.fromkeys(i for stage in self.stages for i in stage.reads))

    @property
    def file_inputs(self) -> tuple[Input, ...]:
        """Every column that names files, once; the first tells the size of a sample."""
        return tuple(i for i in self.inputs if i.kind != "text")
