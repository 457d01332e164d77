"""What a model family declares. All other code is shared and never asks which family it serves.

A family is data and a few pure functions: how its files are recognised and its modules are built,
the stages that turn a row of the data set into tensors, the noising path, and one call of its
denoiser.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import Columns, Input
from diffsynth_dagster.data.geometry import Geometry
from diffsynth_dagster.families.component import (
    Component,
    ComponentNames,
    Construction,
    Part,
    Recognition,
    Settings,
    Tokenizer,
)
from diffsynth_dagster.families.limits import TokenLimit
from diffsynth_dagster.families.lora import LoraRules
from diffsynth_dagster.families.requirements import Refusal, Shapes
from diffsynth_dagster.families.sampling_types import Clip, SampleRequest, Sampling, Tensors
from diffsynth_dagster.objective.noising import Noising

Loaded = Mapping[str, Any]
"""Component name → the module or tokenizer that was loaded."""

__all__ = [
    "Clip",
    "Component",
    "ComponentNames",
    "Construction",
    "Denoiser",
    "Family",
    "Loaded",
    "Output",
    "Part",
    "Recognition",
    "Sample",
    "SampleRequest",
    "Sampling",
    "Settings",
    "Shapes",
    "Stage",
    "Tensors",
    "Tokenizer",
]


@dataclass(frozen=True)
class Output:
    """A tensor that a stage yields for a sample.

    Attributes:
        name: unique in the family.
        role: "target": clean latents that are noised and predicted; "condition": passed to
            `denoise`; "known": mask of the elements of the target called `of` that are given,
            not predicted (1 = known): there x_t = x_0 and the loss does not count, and the mask
            is passed to `denoise` as well; "start": the noise from which a teacher made the target
            called `of`; "steps": how many steps the teacher took; "weight": () what the loss of the
            sample is multiplied by; "mask": how much each element of the target called `of` counts
            in the loss, of its shape or broadcast to it.
        ragged: the first dimension differs between samples: a batch is padded with zeros and gets
            a boolean mask (B, L) under the name + "_mask".
        of: the target that a mask belongs to.
        optional: a sample may lack it (the sound of a silent clip). Samples of a batch have equal
            shapes, so that all of them have it or none has.
        weight: targets only: the parameter that its share of the loss is multiplied by.
    """

    name: str
    role: Literal["target", "condition", "known", "start", "steps", "weight", "mask"]
    ragged: bool = False
    of: str | None = None
    optional: bool = False
    weight: str | None = None


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
        settings: parameters of the config that `run` was made with; stored samples are told apart by
            them too. None of them is at its default.
        limit: how much it reads of a caption, if not all.
    """

    name: str
    reads: tuple[Input, ...]
    uses: tuple[str, ...]
    yields: tuple[Output, ...]
    run: Callable[[Loaded, Sequence[Sample]], list[Tensors]]
    version: int = 1
    needs: tuple[str, ...] = ()
    settings: tuple[tuple[str, int], ...] = ()
    limit: TokenLimit | None = None

    def to_store(self, outputs: Tensors) -> Tensors:
        """The outputs of a sample as they are stored: one that it lacks is an empty tensor."""
        lacking = [o.name for o in self.yields if o.optional and o.name not in outputs]
        return {**outputs, **{name: torch.empty(0) for name in lacking}}

    def from_store(self, stored: Tensors) -> Tensors:
        """The outputs of a sample as `run` yielded them."""
        optional = {o.name for o in self.yields if o.optional}
        return {n: tensor for n, tensor in stored.items() if n not in optional or tensor.numel()}


@dataclass(frozen=True)
class Denoiser:
    """A component whose prediction is trained, and its share of the schedule.

    Attributes:
        low, high: it is at work at timesteps t, low <= t < high.
    """

    component: str
    low: float = 0.0
    high: float = float("inf")


@dataclass(frozen=True)
class Family:
    """A model family. See `families/qwen_image/` for the example to copy.

    Attributes:
        denoisers: the components whose prediction is trained: one, or several that share the schedule.
        denoise: (the denoiser at work, loaded components, conditions, x_t by target, t (B,) in
            [0, 1000]) → prediction by target.
        noising: (config, settings of the scheduler that is published with the denoiser; empty where
            there are none) → the noising path. Raises `ParameterError`.
        inference_sigmas: (number of steps, clean latents by target) → sigmas of the published
            sampler, float32 (steps + 1,) from the most noise down to 0. None: the family cannot be
            distilled.
        sampling: how samples are made of noise: their sizes, the published sampler, the decoder.
        denoise_uses: components that `denoise` uses beside the denoiser where they are given:
            conditioners that see x_t and t, such as a ControlNet.
        parts: tensors of a component that are trained under a name of their own.
        parameters: the parameters for single families (see `config.parameters`) that it takes.
        extra_inputs: what may be named in `extra_inputs` beside columns.
        refusals: combinations of inputs, parameters and models that are not trained.
        variant: (the family, config, component → shapes) → the family as this config uses it: its
            stages and columns, its components' architecture. Shapes are empty for a component that
            is named but whose files are not there. The columns must depend on the config alone.
            Called after `refusals` were checked.
        checkpoints_gradients: whether activations are recomputed where the config leaves it open.
        decoder: components that `sampling` decodes with.
        architecture: what ModelSpec's `architecture` calls the model in the header of what is written.
        authors: the code of the model's authors, whose names its files may have; ModelSpec's
            `implementation` of those.
        scheduler_marks: name of a tensor in a whole checkpoint that nothing computes with → what
            it says about the scheduler.
        warnings: what a variant tells about the config that it does not refuse.
    """

    name: str
    components: tuple[Component, ...]
    tokenizers: tuple[Tokenizer, ...]
    stages: tuple[Stage, ...]
    denoisers: tuple[Denoiser, ...]
    denoise: Callable[[Any, Loaded, Tensors, Tensors, torch.Tensor], Tensors]
    noising: Callable[[TrainingConfig, Settings], Noising]
    geometry: Geometry
    sampling: Sampling
    inference_sigmas: Callable[[int, Tensors], torch.Tensor] | None = None
    denoise_uses: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    parameters: tuple[str, ...] = ()
    extra_inputs: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    variant: Callable[["Family", TrainingConfig, Mapping[str, Shapes]], "Family"] | None = None
    checkpoints_gradients: bool = False
    decoder: tuple[str, ...] = ("vae",)
    architecture: str = ""
    authors: str = ""
    scheduler_marks: Mapping[str, Settings] = field(default_factory=dict[str, Settings])
    warnings: tuple[str, ...] = ()

    def at_work(self, trained: frozenset[str]) -> tuple[Denoiser, ...]:
        """The denoisers that the steps of a training go to: those that are trained, or all of them
        where none is."""
        changed = {self.part(name).of for name in trained}
        return tuple(d for d in self.denoisers if d.component in changed) or self.denoisers

    @property
    def denoiser(self) -> str:
        """The component that is meant where a denoiser is meant and none is named."""
        return self.denoisers[0].component

    def component(self, name: str) -> Component:
        """The component of this name (which exists)."""
        return next(c for c in self.components if c.name == name)

    def stage(self, name: str) -> Stage:
        """The stage of this name (which exists)."""
        return next(s for s in self.stages if s.name == name)

    @property
    def trainable(self) -> tuple[str, ...]:
        """The names of what can be trained: components and parts."""
        return tuple(c.name for c in self.components) + tuple(p.name for p in self.parts)

    def part(self, name: str) -> Part:
        """The tensors of a trainable name: a part, or a component without its parts."""
        for part in self.parts:
            if part.name == name:
                return part
        inside = tuple(start for p in self.parts if p.of == name for start in p.starts)
        component = self.component(name)
        return Part(component.name, name, ("",), inside, component.names.lora)

    def lora_rules(self, name: str) -> LoraRules:
        """What LoRAs of a component or part, which may get one, are called."""
        rules = self.part(name).lora
        assert rules is not None, f"no tool loads a LoRA into '{name}'"
        return rules

    def prefix(self, name: str) -> str:
        """How the checkpoint names of a trainable name start."""
        own = {c.name: c.names.prefix for c in self.components}
        return own.get(name) or f"pipe.{name}."

    @property
    def text_stages(self) -> tuple[Stage, ...]:
        """The stages that read nothing but text."""
        return tuple(s for s in self.stages if all(i.kind == "text" for i in s.reads) and s.reads)

    @property
    def sample_stages(self) -> tuple[Stage, ...]:
        """The stages of what `denoise` needs for a sample, and of targets that are given in part."""
        given = {o.of for s in self.stages for o in s.yields if o.role == "known"}
        wanted: set[str] = set()
        for stage in reversed(self.stages):  # a stage stands behind those that it needs
            handed = (o.role in ("condition", "known") or o.name in given for o in stage.yields)
            if stage.name in wanted or any(handed):
                wanted |= {stage.name, *stage.needs}
        return tuple(s for s in self.stages if s.name in wanted)

    @property
    def samples_from_text(self) -> bool:
        """Whether everything that `denoise` needs can be made from a prompt alone. Size facts are:
        those of the sample that is made."""
        reads = (i.kind for stage in self.sample_stages for i in stage.reads)
        return all(kind in ("text", "sizes") for kind in reads)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Every column that a stage reads, once."""
        return tuple(dict.fromkeys(i for stage in self.stages for i in stage.reads))

    @property
    def caption(self) -> Input | None:
        """The column that says what a sample shows."""
        captions = [i for i in self.inputs if i.caption]
        assert len(captions) <= 1, "a visit of a sample is told one caption"
        return captions[0] if captions else None

    @property
    def file_inputs(self) -> tuple[Input, ...]:
        """Every column that names files, once; the size of a sample is that of the first."""
        return tuple(i for i in self.inputs if i.is_file)

    @property
    def columns(self) -> Columns:
        """What is read of a row, and at which sizes."""
        return Columns(self.name, self.inputs, self.extra_inputs, self.geometry)
