"""What a model family declares. All other code is shared and never asks which family it serves.

A family is data and a few pure functions: how its files are recognised and its modules are built,
the stages that turn a row of the data set into tensors, the noising path, and one call of its
denoiser.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import Columns, Input
from diffsynth_dagster.data.geometry import Geometry
from diffsynth_dagster.families.limits import TokenLimit
from diffsynth_dagster.families.lora import LoraRules
from diffsynth_dagster.families.making import Clip, SampleRequest, Sampling, Tensors
from diffsynth_dagster.families.requirements import Refusal, Shapes
from diffsynth_dagster.objective.path import NoisingPath

Settings = dict[str, object]
"""Keyword arguments of a class of diffusers, or of the config of a class of transformers."""
Loaded = Mapping[str, Any]
"""Component name → the module or tokenizer that was loaded."""

__all__ = [
    "Clip",
    "Component",
    "Denoiser",
    "Family",
    "Loaded",
    "Output",
    "Part",
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
class Component:
    """A module of the model that has weights of its own.

    Attributes:
        name: what `trainable_models` and `lora_base_model` call it (`dit`, `vae`, …).
        folder: its folder in the diffusers layout, which is also its prefix in diffusers' LoRAs.
        signatures: for each accepted layout a few tensor names. Files that hold all names of one
            signature are this component; no other component's files hold them.
        kind: its class in diffusers or transformers.
        settings: shapes of the converted tensors → settings of the class, for files without a
            config.json.
        convert: tensors of any accepted layout → the names (and tensors) of the built module.
            Works on meta tensors too, and leaves tensors that have the module's names alone.
        origin: globs of its files in the repositories of the original layout. They show which
            component an entry of the model list is before any file is there.
        prefix: how the names of its tensors start in checkpoints; `pipe.<name>.` when left out.
        may_lack: modules of it that its files may leave out altogether, such as the decoder of a
            VAE that only encodes. The built module then has None in their place.
        inside: how the names of its tensors start in a file that holds several components (a whole
            checkpoint), or in one whose writer put something before all names. Behind that they are
            in one of the layouts of `signatures`.
        known_by: what the path of its files contains, for a component whose tensors have the names
            and shapes of another's (the experts of Wan2.2). Where the model list has one of the
            two alone, it is taken for the other one, which has no such mark.
        lora: what its LoRAs are called; None where no tool loads one into it.
        other_kinds: start of tensor names → the class of modules that have such tensors, where
            that is not `kind`.
        fixed: settings that hold whatever the config.json or the shapes say.
    """

    name: str
    folder: str
    signatures: tuple[tuple[str, ...], ...]
    kind: type[nn.Module]
    settings: Callable[[Shapes], Settings]
    convert: Callable[[Tensors], Tensors] = field(default=lambda tensors: tensors)
    origin: tuple[str, ...] = ()
    prefix: str = ""
    inside: tuple[str, ...] = ()
    may_lack: tuple[str, ...] = ()
    known_by: tuple[str, ...] = ()
    lora: LoraRules | None = None
    other_kinds: Mapping[str, type[nn.Module]] = field(default_factory=dict[str, type[nn.Module]])
    fixed: Mapping[str, object] = field(default_factory=dict[str, object])

    def kind_of(self, shapes: Shapes) -> type[nn.Module]:
        """The class of the module with these tensors."""
        for start, kind in self.other_kinds.items():
            if any(name.startswith(start) for name in shapes):
                return kind
        return self.kind

    @property
    def classes(self) -> tuple[str, ...]:
        """What its config.json may call the architecture. A config.json beside the files that
        names another one is not this component's, and the settings come from the shapes."""
        return tuple(kind.__name__ for kind in (self.kind, *self.other_kinds.values()))


@dataclass(frozen=True)
class Part:
    """Tensors of a component that are trained under a name of their own (VACE in Wan).

    Attributes:
        of: the component that holds them.
        starts: how their names in the module start.
        without: starts of names that do not belong to the part.
        lora: see `Component`.
    """

    name: str
    of: str
    starts: tuple[str, ...]
    without: tuple[str, ...] = ()
    lora: LoraRules | None = None

    def holds(self, tensor: str) -> bool:
        """Whether a tensor of the component belongs to the part."""
        return tensor.startswith(self.starts) and not tensor.startswith(self.without)


@dataclass(frozen=True)
class Tokenizer:
    """Files that turn text into tokens: no weights, but part of what a cached sample depends on.

    Attributes:
        name: key in `Loaded`.
        parameter: the parameter that names its folder.
        default: `repository:folder/` on ModelScope where the parameter is left out and no folder
            of this name lies beside the model files.
        load: folder → tokenizer.
        markers: special tokens that the family's prompts contain, such as `<|im_start|>`. The
            tokenizer must turn each into exactly one token; one that splits a marker was loaded
            from an incomplete folder, and is refused. Empty for an image processor.
    """

    name: str
    parameter: str
    default: str
    load: Callable[[str], Any]
    markers: tuple[str, ...] = ()


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
        path: (config, settings of the scheduler that is published with the denoiser; empty where
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
    path: Callable[[TrainingConfig, Settings], NoisingPath]
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
        return Part(component.name, name, ("",), inside, component.lora)

    def lora_rules(self, name: str) -> LoraRules:
        """What LoRAs of a component or part, which may get one, are called."""
        rules = self.part(name).lora
        assert rules is not None, f"no tool loads a LoRA into '{name}'"
        return rules

    def prefix(self, name: str) -> str:
        """How the checkpoint names of a trainable name start."""
        own = {c.name: c.prefix for c in self.components}
        return own.get(name) or f"pipe.{name}."

    def cached_stages(self, trained: frozenset[str]) -> tuple[Stage, ...]:
        """The stages that use, themselves and upstream, nothing that is trained."""
        changed = {self.part(name).of for name in trained}
        cached: list[Stage] = []
        names: set[str] = set()
        for stage in self.stages:
            if changed.isdisjoint(stage.uses) and names.issuperset(stage.needs):
                cached.append(stage)
                names.add(stage.name)
        return tuple(cached)

    def step_stages(self, trained: frozenset[str]) -> tuple[Stage, ...]:
        """The stages that run inside the training step."""
        cached = self.cached_stages(trained)
        return tuple(stage for stage in self.stages if stage not in cached)

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
