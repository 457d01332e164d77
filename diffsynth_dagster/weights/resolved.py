"""The model of a config: its family as the config uses it, and its files if they were found."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from diffsynth_dagster.config.affects import trained_components
from diffsynth_dagster.config.entries import ModelEntry
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.families.contract import (
    Component,
    Denoiser,
    Family,
    Settings,
    Shapes,
    Stage,
)
from diffsynth_dagster.families.denoiser_schedule import DenoiserSchedule
from diffsynth_dagster.families.distillation import with_teacher
from diffsynth_dagster.families.loss_weights import with_counted
from diffsynth_dagster.families.requirements import Use, check_refusals
from diffsynth_dagster.objective.noising import Noising
from diffsynth_dagster.weights.contents import Contents
from diffsynth_dagster.weights.header import Header
from diffsynth_dagster.weights.recognise import converted_shapes

Storage = Literal["full", "float8"]
"""How the weights of a component are stored: in the type that it computes in, or in float8."""


@dataclass(frozen=True)
class ComponentFiles:
    """The files of one component.

    Attributes:
        entry: the entry of the model list that names the files.
        header: the component's tensors in the files: name (without `start`) → type and shape.
        config: the config.json beside the files, if it is this component's.
        start: prefix of its tensor names in a whole checkpoint; empty in files of its own.
    """

    component: Component
    entry: ModelEntry
    files: tuple[Path, ...]
    header: Header
    config: Mapping[str, object] | None
    start: str = ""

    @cached_property
    def shapes(self) -> Shapes:
        """Tensor name of the built module → shape. Raises `WeightsError`."""
        return converted_shapes(self.header, self.component, self.entry.text)

    @property
    def lacks(self) -> tuple[str, ...]:
        """The optional modules that the files do not have. Raises `WeightsError`."""
        optional = self.component.construction.optional_modules
        if not optional:
            return ()
        shapes = self.shapes
        return tuple(
            module
            for module in optional
            if not any(name.startswith(f"{module}.") for name in shapes)
        )


@dataclass(frozen=True)
class Preset:
    """A LoRA file and the component or part that it is for."""

    name: str
    path: Path


@dataclass(frozen=True)
class ResolvedModel:
    """The model of a config. Everything that the config decides about the model is derived here.

    Attributes:
        family: as the config uses it: with the stages, columns and architecture that it needs.
        trained: the components and parts whose weights change, in full or through a LoRA.
        noising: how latents are noised.
        schedule: which timesteps each denoiser is trained at.
        components: component → its files; empty if the model was guessed without files.
        tokenizers: tokenizer → its folder.
        storage: component → how its weights are stored.
        presets: component → the LoRA that is fused into it before training.
        contents: the digests of the files.
    """

    family: Family
    trained: frozenset[str]
    noising: Noising
    schedule: DenoiserSchedule
    components: Mapping[str, ComponentFiles]
    tokenizers: Mapping[str, Path] = field(default_factory=dict[str, Path])
    storage: Mapping[str, Storage] = field(default_factory=dict[str, Storage])
    presets: Mapping[str, Preset] = field(default_factory=dict[str, Preset])
    # Not compared: it changes while files are digested.
    contents: Contents = field(default_factory=Contents, compare=False)

    @cached_property
    def trained_components(self) -> frozenset[str]:
        """The components with trained weights. A trained part counts as its component."""
        return frozenset(self.family.part(name).of for name in self.trained)

    @cached_property
    def denoisers(self) -> tuple[Denoiser, ...]:
        """The denoisers that training steps use: see `Family.at_work`."""
        return self.family.at_work(self.trained)

    @cached_property
    def cached_stages(self) -> tuple[Stage, ...]:
        """The stages to cache: neither they nor the stages that they need use trained weights."""
        cached: list[Stage] = []
        names: set[str] = set()
        for stage in self.family.stages:  # each stage comes after those that it needs
            if self.trained_components.isdisjoint(stage.uses) and names.issuperset(stage.needs):
                cached.append(stage)
                names.add(stage.name)
        return tuple(cached)

    @cached_property
    def step_stages(self) -> tuple[Stage, ...]:
        """The stages that run inside the training step."""
        return tuple(stage for stage in self.family.stages if stage not in self.cached_stages)

    @cached_property
    def step_components(self) -> tuple[str, ...]:
        """The components and tokenizers that a training step uses, the denoisers first."""
        used = {name for stage in self.step_stages for name in stage.uses}
        # A trained component may be in no stage of its own: the denoiser, for example.
        used |= self.trained_components
        used |= {name for name in self.family.denoise_uses if name in self.components}
        return tuple(dict.fromkeys([*(d.component for d in self.denoisers), *sorted(used)]))

    def is_float8(self, name: str) -> bool:
        """Whether a component is stored in float8."""
        return self.storage.get(name) == "float8"

    def files(self, name: str) -> tuple[Path, ...]:
        """The files that a component or tokenizer is loaded from, in a fixed order: weights,
        config.json, preset LoRA."""
        if name in self.tokenizers:
            return tuple(sorted(p for p in self.tokenizers[name].rglob("*") if p.is_file()))
        component = self.components[name]
        config = component.files[0].parent / "config.json"
        preset = [self.presets[name].path] if name in self.presets else []
        return (*component.files, *([config] if component.config is not None else []), *preset)

    def require_unchanged(self, name: str) -> None:
        """Check that a component's or tokenizer's files have not changed since they were digested.
        Raises `WeightsError`."""
        self.contents.require_unchanged(name, lambda: self.files(name))


def resolve(
    config: TrainingConfig,
    family: Family,
    published: Settings | None = None,
    components: Mapping[str, ComponentFiles] | None = None,
) -> ResolvedModel:
    """Derive the model of a config.

    Args:
        family: as the config uses it: see `as_used`.
        published: the published scheduler settings of the denoiser, if there are any.
        components: component → its files, if they were found.

    Raises:
        ParameterError: the model cannot be trained at the timesteps of the config: see
            `DenoiserSchedule`.
    """
    trained = trained_components(config)
    noising = family.noising(config, published or {})
    schedule = DenoiserSchedule(config, family, noising, family.at_work(trained))
    return ResolvedModel(family, trained, noising, schedule, components or {})


def as_used(family: Family, config: TrainingConfig, given: Mapping[str, Shapes]) -> Family:
    """The family as a config uses it: with the stages, columns and architecture that it needs.

    Args:
        given: the components of the model list → tensor name → shape; {} if there are no files.

    Raises:
        ParameterError: the family refuses this combination of inputs, parameters and models.
    """
    check_refusals(family.refusals, Use(config, given))
    # The variant first: the steps after it change the stages and losses that it chooses.
    if family.variant is not None:
        family = family.variant(family, config, given)
    if config.caption_lists:
        family = _with_caption_lists(family)
    family = with_counted(family, config)
    return with_teacher(family, config) if config.distills else family


def _with_caption_lists(family: Family) -> Family:
    """The family with caption columns that may hold lists of captions."""
    stages = [
        replace(stage, reads=tuple(replace(i, many=i.many or i.caption) for i in stage.reads))
        for stage in family.stages
    ]
    return replace(family, stages=tuple(stages))
