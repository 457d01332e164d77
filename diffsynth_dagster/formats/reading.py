"""Read LoRA files of any tool, key by key. A file is refused if one of its keys is not understood.

A key consists of a prefix of the component, the name of a layer (as diffusers, the model's authors
or DiffSynth-Studio call it, with dots or underscores), and a suffix for A or B.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from diffsynth_dagster.families.lora import LayerNames, Lora, LoraFormat, LoraRules
from diffsynth_dagster.families.sampling_types import Tensors
from diffsynth_dagster.formats.contract import AllRules, UnreadableLora

_HALVES = tuple(
    re.compile(rf"(?P<layer>.+){end}\.weight")
    for end in (
        r"\.lora_(?P<half>A|B|down|up)(?:\.default(?:_\d+)?)?",
        r"\.lora(?:_linear_layer)?\.(?P<half>down|up)",  # early versions of diffusers
        r"_lora\.(?P<half>down|up)",  # attention processors of diffusers; XLabs, single blocks
        r"(?<=_lora[12])\.(?P<half>down|up)",  # XLabs, double blocks
    )
)
"""Patterns of whole keys, by the suffixes of different tools."""
_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)$")
"""End of a layer's name in files for attention processors of early diffusers."""
_PEFT = "base_model.model."
_DENOISER = "diffusion_model"
_OTHER_KOHYA = ("lora_unet__", "lora_transformer_")
"""Prefixes of other scripts (Wan-Fun, OneTrainer) in place of kohya's `lora_unet_`."""


@dataclass
class _Layer:
    """The tensors of a layer in a file; `key` is the first of their keys."""

    key: str
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    alpha: torch.Tensor | None = None


@dataclass(frozen=True)
class _Start:
    """A prefix that the names of a component's layers may have.

    Attributes:
        text: the prefix.
        names: the namings that may follow it.
        own: whether the names of diffusers, which the modules here have, may follow it.
        saved: whether checkpoints of this trainer have this prefix. In these, layers of one
            component may have different prefixes.
    """

    text: str
    component: str
    names: tuple[LayerNames, ...]
    own: bool
    saved: bool = False

    @property
    def underscores(self) -> bool:
        """Whether the rest of the name has underscores in place of dots."""
        return self.text.startswith("lora_")


@dataclass
class ReadLora:
    """The LoRA of a component, read from a file.

    Attributes:
        start: prefix of the names of its layers.
        key: its first key.
        lora: its layers have the names of the module, as far as these are known. If the file gives
            no alpha of a layer, alpha is the rank.
        alphas: the layers whose alpha the file gives.
        unknown: the first key whose layer is in no table of names, if there is one.
    """

    start: str
    key: str
    lora: Lora = field(default_factory=lambda: Lora({}, {}, {}))
    alphas: set[str] = field(default_factory=set[str])
    unknown: str | None = None

    def add(self, ours: Lora, has_alpha: bool) -> None:
        """Add layers. Raises `UnreadableLora`: one of them is present already."""
        twice = next((name for name in ours.down if name in self.lora.down), None)
        if twice is not None:
            raise UnreadableLora(f"the layer '{twice}' is there twice, under two names")
        before = self.lora
        self.lora = Lora(
            {**before.down, **ours.down},
            {**before.up, **ours.up},
            {**before.scale, **ours.scale},
        )
        self.alphas |= set(ours.down) if has_alpha else set()


def read_all(
    tensors: Tensors,
    rules: AllRules,
    formats: Iterable[LoraFormat] | None = None,
    prefixes: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, ReadLora]:
    """Component → its LoRA in a file.

    Args:
        formats: the formats that are recognised; all if left out, and variants of further tools.
        prefixes: component → prefixes that its layers have in checkpoints of this trainer;
            `pipe.<component>.` if left out.

    Raises:
        UnreadableLora: a key is not understood (the message names the first one), or the file holds no
            LoRA, or half of one.
    """
    starts = _starts(rules, formats, prefixes or {})
    saved = {start.text for start in starts if start.saved}
    found: dict[str, ReadLora] = {}
    for name, layer in _layers_of(tensors).items():
        # The prefixes are sorted by length, so the first match is the longest.
        start = next((s for s in starts if name.startswith(s.text)), None)
        if start is None:
            raise UnreadableLora(f"its names start in a way that is not known: {layer.key}")
        read = found.setdefault(start.component, ReadLora(start.text, layer.key))
        # Two prefixes would mean that two files were mixed, or that one is misunderstood.
        if read.start != start.text and not (start.saved and read.start in saved):
            raise UnreadableLora(
                f"the names of layers start in two ways, '{read.start}' ({read.key}) and "
                f"'{start.text}' ({layer.key})"
            )
        _add(read, name.removeprefix(start.text), layer, start, strict=formats is not None)
    return found


def read_as(name: LoraFormat, tensors: Tensors, rules: AllRules) -> dict[str, Lora]:
    """Component → its LoRA in a file of one format. Raises `UnreadableLora`."""
    return {component: read.lora for component, read in read_all(tensors, rules, [name]).items()}


def _add(read: ReadLora, name: str, layer: _Layer, start: _Start, strict: bool) -> None:
    """Add a layer to a LoRA, renamed by the first naming that knows it.

    Raises:
        UnreadableLora: no naming knows it, and it cannot be a name of diffusers.
    """
    if start.own and not start.underscores:
        # `attn.processor.to_out` is the layer `attn.to_out.0` of today's diffusers.
        name = _PROCESSOR.sub(lambda m: f".{m[1]}" + ".0" * (m[1] == "to_out"), name)
    naming = next((n for n in start.names if n.ours(name)), None)
    if naming is None:
        if strict and (start.underscores or not start.own):
            raise UnreadableLora(f"the layer is not known: {layer.key}")
        # It may be a name of diffusers: whoever has the module can tell.
        read.unknown = read.unknown or layer.key
    assert layer.down is not None
    assert layer.up is not None
    alpha = len(layer.down) if layer.alpha is None else float(layer.alpha)
    lora = Lora({name: layer.down}, {name: layer.up}, {name: alpha / len(layer.down)})
    try:
        read.add(lora if naming is None else naming.to_ours(lora), layer.alpha is not None)
    except RuntimeError as error:  # stacked layers (such as qkv) cannot be split to their sizes
        raise UnreadableLora(f"the layer is of another size: {layer.key}: {error}") from error


def _starts(
    rules: AllRules, formats: Iterable[LoraFormat] | None, prefixes: Mapping[str, Sequence[str]]
) -> list[_Start]:
    """The prefixes that names of layers may have, the longest first."""
    wanted = None if formats is None else set(formats)
    found: list[_Start] = []
    # If all formats are read, any prefix may come with any naming. Otherwise every format has its
    # own naming.
    for number, (name, lora_rules) in enumerate(rules.items()):
        saved = prefixes.get(name, (f"pipe.{name}.",))
        bare = ("",) if number == 0 else ()  # names without a prefix belong to the first component
        if wanted is None:
            dotted = (*saved, f"{lora_rules.folder}.", f"{lora_rules.comfyui}.", *bare)
            denoiser = lora_rules.comfyui == _DENOISER
            more = (f"model.{_DENOISER}.", "pipe.") if denoiser else ()
            dotted = (*dotted, *more)
            kohya = (*lora_rules.kohya, *(_OTHER_KOHYA if denoiser else ()))
            # peft puts its own prefix before any other.
            texts = (*dotted, *(_PEFT + text for text in dotted), *kohya)
            in_checkpoints = (*saved, *bare)
            found += [
                _Start(t, name, _all_names(lora_rules), True, t in in_checkpoints) for t in texts
            ]
            continue
        for format_name, texts in (
            ("diffusers", (f"{lora_rules.folder}.",)),
            ("peft", (_PEFT,)),
            ("comfyui", (f"{lora_rules.comfyui}.",)),
            ("guide", (*saved, *bare)),
            ("kohya", lora_rules.kohya),
        ):
            if format_name in wanted:
                names = names_in(format_name, lora_rules)
                namings = () if names is None else (names,)
                is_saved = format_name == "guide"
                found += [_Start(text, name, namings, names is None, is_saved) for text in texts]
    return sorted(found, key=lambda start: -len(start.text))


def names_in(format_name: LoraFormat, rules: LoraRules) -> LayerNames | None:
    """The naming of layers in a format; None if it is that of diffusers."""
    match format_name:
        case "comfyui":
            return rules.authors
        case "guide":
            return rules.guide
        case "kohya":
            return rules.kohya_names or rules.authors
        case _:
            return None


def _all_names(rules: LoraRules) -> tuple[LayerNames, ...]:
    namings = (rules.authors, rules.guide, rules.kohya_names)
    return tuple(names for names in namings if names is not None)


def _half(key: str) -> re.Match[str] | None:
    """Match a key with the groups `layer` and `half`; None if it is not a half of a LoRA."""
    return next(filter(None, (half.fullmatch(key) for half in _HALVES)), None)


def of_loras(tensors: Tensors) -> Tensors:
    """The tensors of a checkpoint that belong to LoRAs. The others are weights trained in full."""
    halves = {key: match["layer"] for key in tensors if (match := _half(key)) is not None}
    layers = set(halves.values())
    return {
        key: tensor
        for key, tensor in tensors.items()
        if key in halves or (key.endswith(".alpha") and key.removesuffix(".alpha") in layers)
    }


def _layers_of(tensors: Tensors) -> dict[str, _Layer]:
    """Name of a layer in a file → its tensors.

    Raises:
        UnreadableLora: a key is neither a half of a LoRA nor an alpha, or a layer lacks one of its halves,
            or these differ in rank.
    """
    layers: dict[str, _Layer] = {}
    rest: list[str] = []  # an alpha may come before the halves of its layer
    for key, tensor in tensors.items():
        match = _half(key)
        if match is None:
            rest.append(key)
            continue
        layer = layers.setdefault(match["layer"], _Layer(key))
        if match["half"] in ("A", "down"):
            layer.down = tensor
        else:
            layer.up = tensor
    for key in rest:
        name = key.removesuffix(".alpha")
        # `x_lora.alpha` is the alpha of layer `x`, as `x_lora.down.weight` is a half of it.
        name = name if name in layers else name.removesuffix("_lora")
        if name == key or name not in layers:
            raise UnreadableLora(f"it changes weights in another way than by a plain LoRA: {key}")
        if tensors[key].numel() != 1:
            raise UnreadableLora(f"an alpha is no number: {key}")
        # An alpha of 0 counts as none, as in kohya's scripts.
        layers[name].alpha = tensors[key] if float(tensors[key]) else None
    for layer in layers.values():
        if not _are_halves(layer.down, layer.up):
            raise UnreadableLora(f"it holds half of a LoRA, or halves of two ranks: {layer.key}")
    if not layers:
        raise UnreadableLora("it holds no LoRA")
    return layers


def _are_halves(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether a layer has A (rank, in, …) and B (out, rank, …) of one rank."""
    if a is None or b is None or min(a.ndim, b.ndim) < 2:
        return False
    return len(a) == b.shape[1] and a.numel() > 0 and b.numel() > 0
