"""Reading LoRA files of any tool, key by key: what is not understood whole is refused.

A key is what starts the names of a component, the name of a layer (by diffusers, the model's authors or
DiffSynth-Studio, with dots or with underscores), and which half of the LoRA it is.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from diffsynth_dagster.families.lora import LayerNames, Lora, LoraFormat, LoraRules
from diffsynth_dagster.families.making import Tensors
from diffsynth_dagster.formats.contract import AllRules, Unread

_HALVES = tuple(
    re.compile(rf"(?P<layer>.+){end}\.weight")
    for end in (
        r"\.lora_(?P<half>A|B|down|up)(?:\.default(?:_\d+)?)?",
        r"\.lora(?:_linear_layer)?\.(?P<half>down|up)",  # early versions of diffusers
        r"_lora\.(?P<half>down|up)",  # its processors, and XLabs' of single blocks
        r"(?<=_lora[12])\.(?P<half>down|up)",  # XLabs' of double blocks
    )
)
_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)$")
_PEFT = "base_model.model."
_DENOISER = "diffusion_model"
_OTHER_KOHYA = ("lora_unet__", "lora_transformer_")
"""What other scripts (Wan-Fun's, OneTrainer's) have in place of kohya's `lora_unet_`."""


@dataclass
class _Layer:
    """What a file holds of a layer; `key` is the first of its names."""

    key: str
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    alpha: torch.Tensor | None = None


@dataclass(frozen=True)
class _Start:
    """How the names of a component's layers may start.

    Attributes:
        names: who may have named the layers.
        own: whether they may have diffusers' names.
        saved: whether checkpoints of this trainer start so, or with nothing: parts of a component may
            start differently there.
    """

    text: str
    component: str
    names: tuple[LayerNames, ...]
    own: bool
    saved: bool = False

    @property
    def underscores(self) -> bool:
        """Whether the rest of the name has underscores for its dots."""
        return self.text.startswith("lora_")


@dataclass
class ReadLora:
    """The LoRA of a component, as a file holds it.

    Attributes:
        start: how the names of its layers start.
        key: its first key.
        lora: by the names of the module's layers, if they are known. Where the file gives no alpha,
            alpha is the rank.
        alphas: the layers for which it gives one.
        unknown: the first key whose layer is in no table of names, if there is one.
    """

    start: str
    key: str
    lora: Lora = field(default_factory=lambda: Lora({}, {}, {}))
    alphas: set[str] = field(default_factory=set[str])
    unknown: str | None = None

    def add(self, ours: Lora, has_alpha: bool) -> None:
        """Take in some layers. Raises `Unread`: one of them is there already."""
        twice = next((name for name in ours.down if name in self.lora.down), None)
        if twice is not None:
            raise Unread(f"the layer '{twice}' is there twice, under two names")
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
        formats: those that are read; left out, all, and the spellings of further tools.
        prefixes: component → how the names in checkpoints may start; `pipe.<component>.` where it is
            left out.

    Raises:
        Unread: with the first key that is not understood; or the file holds no LoRA, or half of one.
    """
    starts = _starts(rules, formats, prefixes or {})
    saved = {start.text for start in starts if start.saved}
    found: dict[str, ReadLora] = {}
    for name, layer in _layers_of(tensors).items():
        start = next((s for s in starts if name.startswith(s.text)), None)
        if start is None:
            raise Unread(f"its names start in a way that is not known: {layer.key}")
        own = found.setdefault(start.component, ReadLora(start.text, layer.key))
        if own.start != start.text and not (start.saved and own.start in saved):
            raise Unread(
                f"the names of layers start in two ways, '{own.start}' ({own.key}) and "
                f"'{start.text}' ({layer.key})"
            )
        _add(own, name.removeprefix(start.text), layer, start, strict=formats is not None)
    return found


def read_as(name: LoraFormat, tensors: Tensors, rules: AllRules) -> dict[str, Lora]:
    """Component → its LoRA in a file of a format. Raises `Unread`."""
    return {component: own.lora for component, own in read_all(tensors, rules, [name]).items()}


def _add(own: ReadLora, name: str, layer: _Layer, start: _Start, strict: bool) -> None:
    """Add a layer by the first naming that knows it.

    Raises:
        Unread: none does, and the name cannot be one of diffusers'.
    """
    if start.own and not start.underscores:
        name = _PROCESSOR.sub(lambda m: f".{m[1]}" + ".0" * (m[1] == "to_out"), name)
    naming = next((n for n in start.names if n.ours(name)), None)
    if naming is None:
        if strict and (start.underscores or not start.own):
            raise Unread(f"the layer is not known: {layer.key}")
        own.unknown = own.unknown or layer.key
    assert layer.down is not None
    assert layer.up is not None
    alpha = len(layer.down) if layer.alpha is None else float(layer.alpha)
    lora = Lora({name: layer.down}, {name: layer.up}, {name: alpha / len(layer.down)})
    try:
        own.add(lora if naming is None else naming.to_ours(lora), layer.alpha is not None)
    except RuntimeError as error:  # the heights of layers that stand one above another
        raise Unread(f"the layer is of another size: {layer.key}: {error}") from error


def _starts(
    rules: AllRules, formats: Iterable[LoraFormat] | None, prefixes: Mapping[str, Sequence[str]]
) -> list[_Start]:
    """How the names of layers may start, the longest first."""
    wanted = None if formats is None else set(formats)
    found: list[_Start] = []
    for number, (name, own) in enumerate(rules.items()):
        saved = prefixes.get(name, (f"pipe.{name}.",))
        bare = ("",) if number == 0 else ()
        if wanted is None:
            dotted = (*saved, f"{own.folder}.", f"{own.comfyui}.", *bare)
            denoiser = own.comfyui == _DENOISER
            more = (f"model.{_DENOISER}.", "pipe.") if denoiser else ()
            dotted = (*dotted, *more)
            kohya = (*own.kohya, *(_OTHER_KOHYA if denoiser else ()))
            texts = (*dotted, *(_PEFT + text for text in dotted), *kohya)
            kept = (*saved, *bare)
            found += [_Start(t, name, _all_names(own), True, t in kept) for t in texts]
            continue
        for format_name, texts in (
            ("diffusers", (f"{own.folder}.",)),
            ("peft", (_PEFT,)),
            ("comfyui", (f"{own.comfyui}.",)),
            ("guide", (*saved, *bare)),
            ("kohya", own.kohya),
        ):
            if format_name in wanted:
                names = names_in(format_name, own)
                given = () if names is None else (names,)
                kept = format_name == "guide"
                found += [_Start(text, name, given, names is None, kept) for text in texts]
    return sorted(found, key=lambda start: -len(start.text))


def names_in(format_name: LoraFormat, rules: LoraRules) -> LayerNames | None:
    """The names of layers in a format; None for those of diffusers."""
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
    given = (rules.authors, rules.guide, rules.kohya_names)
    return tuple(names for names in given if names is not None)


def _half(key: str) -> re.Match[str] | None:
    """The layer and the half that a key names; None where it is no half of a LoRA."""
    return next(filter(None, (half.fullmatch(key) for half in _HALVES)), None)


def of_loras(tensors: Tensors) -> Tensors:
    """Of the tensors of a checkpoint those of LoRAs; the others are weights that were trained in full."""
    halves = {key: match["layer"] for key in tensors if (match := _half(key)) is not None}
    layers = set(halves.values())
    return {
        key: tensor
        for key, tensor in tensors.items()
        if key in halves or (key.endswith(".alpha") and key.removesuffix(".alpha") in layers)
    }


def _layers_of(tensors: Tensors) -> dict[str, _Layer]:
    """Name of a layer in a file → what the file holds of it.

    Raises:
        Unread: a key is of no half and no alpha, or a layer has no two halves of one rank.
    """
    layers: dict[str, _Layer] = {}
    rest: list[str] = []
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
        name = name if name in layers else name.removesuffix("_lora")
        if name == key or name not in layers:
            raise Unread(f"it changes weights in another way than by a plain LoRA: {key}")
        if tensors[key].numel() != 1:
            raise Unread(f"an alpha is no number: {key}")
        # As in kohya's scripts, an alpha of 0 counts as none.
        layers[name].alpha = tensors[key] if float(tensors[key]) else None
    for layer in layers.values():
        if not _are_halves(layer.down, layer.up):
            raise Unread(f"it holds half of a LoRA, or halves of two ranks: {layer.key}")
    if not layers:
        raise Unread("it holds no LoRA")
    return layers


def _are_halves(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether a layer has an A (rank, …) and a B (…, rank) of one rank."""
    if a is None or b is None or min(a.ndim, b.ndim) < 2:
        return False
    return len(a) == b.shape[1] and a.numel() > 0 and b.numel() > 0
