"""Components: the modules of a model that have their own weights (transformer, VAE, text encoder).

A family declares three things for each of its components: how to recognise its files
(`Recognition`), how to build the module (`Construction`), and what other tools call it
(`ComponentNames`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from diffsynth_dagster.families.lora import LoraRules
from diffsynth_dagster.families.requirements import Shapes
from diffsynth_dagster.families.sampling_types import Tensors

Settings = dict[str, object]
"""Keyword arguments of a diffusers class, or of the config of a transformers class."""


@dataclass(frozen=True, kw_only=True)
class Recognition:
    """How to recognise the files of a component.

    Attributes:
        signatures: a few tensor names for each accepted layout. A file that contains all names of
            one signature belongs to this component, and no file of another component does.
        checkpoint_prefixes: prefixes of the tensor names in a file with several components (a whole
            checkpoint), or in a file whose writer added a prefix. After the prefix is removed, the
            names follow one of the layouts in `signatures`.
        original_globs: file names in the authors' repositories. They identify the component of a
            model list entry before the file is downloaded.
        path_marks: parts of the path that identify this component when another one has the same
            tensor names and shapes (the experts of Wan2.2). A model list with only one of the two
            is read as the one without marks.
    """

    signatures: tuple[tuple[str, ...], ...]
    checkpoint_prefixes: tuple[str, ...] = ()
    original_globs: tuple[str, ...] = ()
    path_marks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Construction:
    """How to build the module of a component from its files.

    Attributes:
        kind: the module's class in diffusers or transformers.
        other_kinds: prefix of tensor names → the class to build instead of `kind` when the files
            contain tensors with this prefix.
        settings: shapes of the converted tensors → settings of the class, for files without a
            config.json.
        fixed: settings that override the config.json and the shapes.
        convert: tensors in any accepted layout → tensors under the names of the built module. Works
            on meta tensors too, and returns tensors that already have these names unchanged.
        optional_modules: submodules that the files may omit, such as the decoder of a VAE that only
            encodes. The built module then has None in their place.
        blocks: class names of the repeated blocks, for classes where neither diffusers
            (`_repeated_blocks`) nor transformers (`_no_split_modules`) declares them.
    """

    kind: type[nn.Module]
    other_kinds: Mapping[str, type[nn.Module]] = field(default_factory=dict[str, type[nn.Module]])
    settings: Callable[[Shapes], Settings]
    fixed: Mapping[str, object] = field(default_factory=dict[str, object])
    convert: Callable[[Tensors], Tensors] = field(default=lambda tensors: tensors)
    optional_modules: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()

    def kind_of(self, shapes: Shapes) -> type[nn.Module]:
        """The class to build for these tensors."""
        for prefix, kind in self.other_kinds.items():
            if any(name.startswith(prefix) for name in shapes):
                return kind
        return self.kind

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names that its config.json may give. A config.json with another class name
        belongs to another component; then the settings come from the shapes."""
        return tuple(kind.__name__ for kind in (self.kind, *self.other_kinds.values()))

    @property
    def repeated_blocks(self) -> tuple[str, ...]:
        """Class names of the repeated blocks: the units to compile, offload and shard by."""
        attributes = ("_repeated_blocks", "_no_split_modules")
        kinds = (self.kind, *self.other_kinds.values())
        # The base classes leave these attributes out, empty or None.
        declared = [
            block
            for kind in kinds
            for name in attributes
            for block in getattr(kind, name, None) or ()
        ]
        return self.blocks or tuple(dict.fromkeys(declared))


@dataclass(frozen=True, kw_only=True)
class ComponentNames:
    """What files call a component.

    Attributes:
        folder: its folder in the diffusers layout, and its prefix in diffusers' LoRA files.
        prefix: prefix of its tensor names in checkpoints; `pipe.<name>.` if empty.
        lora: how its LoRAs are named; None if no tool loads a LoRA into this component.
    """

    folder: str
    prefix: str = ""
    lora: LoraRules | None = None


@dataclass(frozen=True, kw_only=True)
class Component:
    """A module of a model that has its own weights.

    Attributes:
        name: its name in `trainable_models` and `lora_base_model` (`dit`, `vae`, …).
    """

    name: str
    recognition: Recognition
    construction: Construction
    names: ComponentNames


@dataclass(frozen=True)
class Part:
    """A subset of a component's tensors that can be trained under its own name (VACE in Wan).

    Attributes:
        of: the component that contains the tensors.
        starts: prefixes of the tensors' names in the module.
        without: prefixes to exclude again.
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
    """A tokenizer or image processor. It has no weights, but cached samples depend on its files.

    Attributes:
        name: its key in `Loaded`.
        parameter: the parameter that gives its folder.
        default: `repository:folder/` on ModelScope. Used when the parameter is not given and no
            folder called `name` lies beside the model files.
        load: folder → tokenizer.
        markers: special tokens that the family's prompts contain, such as `<|im_start|>`. Each must
            become exactly one token. A tokenizer that splits a marker was loaded from an incomplete
            folder and is refused. Empty for an image processor.
    """

    name: str
    parameter: str
    default: str
    load: Callable[[str], Any]
    markers: tuple[str, ...] = ()
