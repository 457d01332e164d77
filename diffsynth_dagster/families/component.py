"""What a family declares of its components: the modules of the model that have weights of their own.

A component says three things: how its files are recognised, how its module is built, and what its files
are called elsewhere.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from diffsynth_dagster.families.lora import LoraRules
from diffsynth_dagster.families.requirements import Shapes
from diffsynth_dagster.families.sampling_types import Tensors

Settings = dict[str, object]
"""Keyword arguments of a class of diffusers, or of the config of a class of transformers."""


@dataclass(frozen=True, kw_only=True)
class Recognition:
    """How the files of a component are recognised.

    Attributes:
        signatures: for each accepted layout a few tensor names. Files that hold all names of one
            signature are this component; no other component's files hold them.
        checkpoint_prefixes: how the names of its tensors start in a file that holds several components
            (a whole checkpoint), or in one whose writer put something before all names. Behind that
            they are in one of the layouts of `signatures`.
        original_globs: its files in the repositories of the original layout. They show which
            component an entry of the model list is before any file is there.
        path_marks: what the path of its files contains, for a component whose tensors have the names
            and shapes of another's (the experts of Wan2.2). Where the model list has one of the
            two alone, it is taken for the other one, which has no such mark.
    """

    signatures: tuple[tuple[str, ...], ...]
    checkpoint_prefixes: tuple[str, ...] = ()
    original_globs: tuple[str, ...] = ()
    path_marks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Construction:
    """How the module of a component is built from its files.

    Attributes:
        kind: its class in diffusers or transformers.
        other_kinds: start of tensor names → the class of modules that have such tensors, where
            that is not `kind`.
        settings: shapes of the converted tensors → settings of the class, for files without a
            config.json.
        fixed: settings that hold whatever the config.json or the shapes say.
        convert: tensors of any accepted layout → the names (and tensors) of the built module.
            Works on meta tensors too, and leaves tensors that have the module's names alone.
        optional_modules: modules of it that its files may leave out altogether, such as the decoder
            of a VAE that only encodes. The built module then has None in their place.
        blocks: names of the classes of its repeated blocks, where neither diffusers
            (`_repeated_blocks`) nor transformers (`_no_split_modules`) knows them.
    """

    kind: type[nn.Module]
    other_kinds: Mapping[str, type[nn.Module]] = field(default_factory=dict[str, type[nn.Module]])
    settings: Callable[[Shapes], Settings]
    fixed: Mapping[str, object] = field(default_factory=dict[str, object])
    convert: Callable[[Tensors], Tensors] = field(default=lambda tensors: tensors)
    optional_modules: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()

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

    @property
    def repeated_blocks(self) -> tuple[str, ...]:
        """Names of the classes of its repeated blocks, the units to compile, offload and shard by."""
        known = ("_repeated_blocks", "_no_split_modules")
        kinds = (self.kind, *self.other_kinds.values())
        named = [
            block for kind in kinds for name in known for block in getattr(kind, name, None) or ()
        ]
        return self.blocks or tuple(dict.fromkeys(named))


@dataclass(frozen=True, kw_only=True)
class ComponentNames:
    """What a component is called in files.

    Attributes:
        folder: its folder in the diffusers layout, which is also its prefix in diffusers' LoRAs.
        prefix: how the names of its tensors start in checkpoints; `pipe.<name>.` when left out.
        lora: what its LoRAs are called; None where no tool loads one into it.
    """

    folder: str
    prefix: str = ""
    lora: LoraRules | None = None


@dataclass(frozen=True, kw_only=True)
class Component:
    """A module of the model that has weights of its own.

    Attributes:
        name: what `trainable_models` and `lora_base_model` call it (`dit`, `vae`, …).
    """

    name: str
    recognition: Recognition
    construction: Construction
    names: ComponentNames


@dataclass(frozen=True)
class Part:
    """Tensors of a component that are trained under a name of their own (VACE in Wan).

    Attributes:
        of: the component that holds them.
        starts: how their names in the module start.
        without: starts of names that do not belong to the part.
        lora: see `ComponentNames`.
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
