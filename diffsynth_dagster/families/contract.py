"""What a model family declares. All other code is shared and never asks which family it serves.

A family is data and a few pure functions: its components (how to recognise their files and build
their modules), the stages that turn a row of the data set into tensors, the noising path, and one
call of its denoiser.
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
"""Component or tokenizer name → the loaded module or tokenizer."""

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
        role: what the tensor is used for:
            "target": clean latents x_0, which are noised and predicted.
            "condition": passed to `denoise`.
            "known": mask of the elements of the target `of` that are given, not predicted
            (1 = known). There x_t = x_0, and the loss leaves them out. Also passed to `denoise`.
            "start": the noise from which a teacher made the target `of`.
            "steps": the number of steps that the teacher took.
            "weight": (), a factor for the loss of the sample.
            "mask": a factor for the loss of each element of the target `of`, broadcast to it.
        ragged: the first dimension differs between samples. A batch is padded with zeros and gets a
            boolean mask (B, L) called name + "_mask".
        of: the target that this tensor belongs to.
        optional: a sample may lack it (the sound of a silent clip). Samples of a batch have equal
            shapes, so either all of them have it or none.
        weight: for targets: the parameter that scales this target's loss.
    """

    name: str
    role: Literal["target", "condition", "known", "start", "steps", "weight", "mask"]
    ragged: bool = False
    of: str | None = None
    optional: bool = False
    weight: str | None = None


Sample = Mapping[str, Any]
"""Inputs of one sample: column → value, and output name of an earlier stage → tensor."""


@dataclass(frozen=True)
class Stage:
    """A named step from a sample's inputs to tensors.

    The outputs are cached if neither this stage nor a stage in `needs` uses a trained component.
    Otherwise the stage runs inside the training step.

    Attributes:
        reads: the columns that it reads.
        uses: the components and tokenizers that it uses.
        run: (loaded components, samples of equal shape) → the outputs of each sample, on the
            device of the component. A sample's outputs must not depend on the rest of the batch.
        version: increase it when `run` yields different outputs for the same inputs.
        needs: stages whose outputs it reads.
        settings: non-default parameters of the config that `run` depends on. They are part of the
            cache key.
        limit: how much of a caption it reads; None if it reads all.
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
        """The outputs of a sample as the cache stores them.

        A missing optional output becomes an empty tensor, so that every stored sample has the same
        names.
        """
        missing = [o.name for o in self.yields if o.optional and o.name not in outputs]
        return {**outputs, **{name: torch.empty(0) for name in missing}}

    def from_store(self, stored: Tensors) -> Tensors:
        """The outputs of a stored sample, as `run` yielded them: the inverse of `to_store`."""
        optional = {o.name for o in self.yields if o.optional}
        return {n: tensor for n, tensor in stored.items() if n not in optional or tensor.numel()}


@dataclass(frozen=True)
class Denoiser:
    """A component that predicts the targets, and the timesteps that it is used at.

    Attributes:
        low, high: it is used at timesteps low <= t < high, t in [0, 1000].
    """

    component: str
    low: float = 0.0
    high: float = float("inf")


@dataclass(frozen=True)
class Family:
    """A model family. To add one, copy `families/qwen_image/`.

    Attributes:
        denoisers: one component that predicts the targets, or several that share the schedule.
        denoise: (denoiser, loaded components, conditions, x_t by target, t (B,) in [0, 1000]) →
            prediction by target.
        noising: (config, settings of the published scheduler; empty if unknown) → the noising path.
            Raises `ParameterError`.
        inference_sigmas: (number of steps, clean latents by target) → sigmas of the published
            sampler, float32 (steps + 1,), from pure noise down to 0. None: the family cannot be
            distilled.
        sampling: how to make samples: their sizes, the published sampler, the decoder.
        denoise_uses: optional components that `denoise` uses beside the denoiser: conditioners that
            see x_t and t, such as a ControlNet.
        parts: subsets of a component's tensors that can be trained under their own names.
        parameters: the family-specific parameters that it accepts (see `config.parameters`).
        extra_inputs: optional columns that `extra_inputs` may list.
        refusals: combinations of inputs, parameters and models that cannot be trained.
        variant: (the family, config, component → shapes) → the family as this config uses it, with
            other stages, columns or settings. Called after `refusals` were checked. The shapes of a
            component are empty if it is listed but its files are not there yet. The columns must
            depend on the config only: they are needed before the files are there.
        checkpoints_gradients: the default for recomputing activations in the backward pass.
        decoder: the components that `sampling` decodes with.
        architecture: ModelSpec's `architecture`, written into file headers.
        authors: URL of the authors' code. ModelSpec's `implementation` for files with their names.
        scheduler_marks: name of a marker tensor in a whole checkpoint → the scheduler settings that
            it stands for. No computation uses these tensors.
        warnings: warnings of `variant` about the config.
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
        """The denoisers that training steps use: the trained ones, or all if none is trained
        (when only a text encoder is trained)."""
        components = {self.part(name).of for name in trained}
        return tuple(d for d in self.denoisers if d.component in components) or self.denoisers

    @property
    def denoiser(self) -> str:
        """The default denoiser: the first one."""
        return self.denoisers[0].component

    def component(self, name: str) -> Component:
        """The component of this name, which must exist."""
        return next(c for c in self.components if c.name == name)

    def stage(self, name: str) -> Stage:
        """The stage of this name, which must exist."""
        return next(s for s in self.stages if s.name == name)

    @property
    def trainable(self) -> tuple[str, ...]:
        """The names that can be trained: components and parts."""
        return tuple(c.name for c in self.components) + tuple(p.name for p in self.parts)

    def part(self, name: str) -> Part:
        """The tensors that a trainable name means: a part, or a component without its parts."""
        for part in self.parts:
            if part.name == name:
                return part
        excluded = tuple(start for p in self.parts if p.of == name for start in p.starts)
        component = self.component(name)
        # Every name starts with "", so this takes all tensors that are in no part.
        return Part(component.name, name, ("",), excluded, component.names.lora)

    def lora_rules(self, name: str) -> LoraRules:
        """The LoRA rules of a component or part that can get a LoRA."""
        rules = self.part(name).lora
        assert rules is not None, f"no tool loads a LoRA into '{name}'"
        return rules

    def prefix(self, name: str) -> str:
        """The prefix of tensor names in checkpoints of a component or part."""
        declared = {c.name: c.names.prefix for c in self.components}
        return declared.get(name) or f"pipe.{name}."

    @property
    def sample_stages(self) -> tuple[Stage, ...]:
        """The stages needed to make a sample: they yield the conditions, the known masks, and the
        targets that are partly given (a first frame)."""
        partly_given = {o.of for s in self.stages for o in s.yields if o.role == "known"}
        needed: set[str] = set()
        # Stages are listed after the stages that they need, so one backward pass is enough.
        for stage in reversed(self.stages):
            is_input = (
                o.role in ("condition", "known") or o.name in partly_given for o in stage.yields
            )
            if stage.name in needed or any(is_input):
                needed |= {stage.name, *stage.needs}
        return tuple(s for s in self.stages if s.name in needed)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """All columns that the stages read, without repetition."""
        return tuple(dict.fromkeys(i for stage in self.stages for i in stage.reads))

    @property
    def caption(self) -> Input | None:
        """The caption column; None if no stage reads one."""
        captions = [i for i in self.inputs if i.caption]
        assert len(captions) <= 1, "a family reads at most one caption column"
        return captions[0] if captions else None

    @property
    def file_inputs(self) -> tuple[Input, ...]:
        """All columns that contain files. The first one determines the size of a sample."""
        return tuple(i for i in self.inputs if i.is_file)

    @property
    def columns(self) -> Columns:
        """The columns that are read from a row, and the size rules for their files."""
        return Columns(self.name, self.inputs, self.extra_inputs, self.geometry)
