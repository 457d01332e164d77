"""What is trained: whole components, and LoRA layers inside a component."""

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import ParameterError, TargetError, WeightsError, nearest
from diffsynth_dagster.families.contract import Family, Part
from diffsynth_dagster.training.adapters import adapter_shapes, add_adapter, is_adapter, saved_name
from diffsynth_dagster.training.lora_formats import check_formats
from diffsynth_dagster.weights.adapter_files import (
    AdapterFile,
    read_adapter,
    require_values,
    start_adapter,
)
from diffsynth_dagster.weights.load import build_empty, require_buildable
from diffsynth_dagster.weights.lora import (
    LoraFile,
    read_lora,
    require_fit,
    require_start,
    start_lora,
)
from diffsynth_dagster.weights.models import require_component
from diffsynth_dagster.weights.resolved import ResolvedModel
from diffsynth_dagster.weights.whole import require_weights

AUTO_MIN_FEATURES = 512


def check_model(
    config: TrainingConfig,
    found: ResolvedModel,
    trained_dtype: torch.dtype,
    warn: Callable[[str], None] = lambda _: None,
) -> int:
    """Check before anything is encoded that the files are whole, that the LoRA targets match, and
    that the LoRAs and the weights to go on from fit.

    Args:
        trained_dtype: element type of weights that are trained as a whole; a LoRA is float32.
        warn: is told of what a LoRA file holds for other components.

    Returns:
        Bytes of the trained weights, which are those of a checkpoint.

    Raises:
        WeightsError: a component is missing, its files are not whole, or a LoRA does not fit: see
            `require_fit` and `require_start`.
        TargetError: see `lora_targets`.
    """
    if not config.encodes_only:
        for name in found.step_components:
            require_component(found, name)
    if config.sample_prompts or config.customized_evaluation:
        _require_decoders(found)
    looked_into = found.trained_components | found.presets.keys()
    size = 0
    for name, item in found.components.items():
        require_buildable(item)
        if name not in looked_into:
            continue
        module = build_empty(item)
        for part in (found.family.part(n) for n in config.trainable_models):
            if part.of == name:
                held = _held(part, module, f"trainable_models; {item.entry.text}")
                size += sum(p.numel() for p in held) * trained_dtype.itemsize
                if config.resume_from_checkpoint is not None:
                    path = Path(config.resume_from_checkpoint)
                    where = f"resume_from_checkpoint = {path.absolute()}"
                    require_weights(module, path, found.family, part.name, where)
        if name in found.presets:
            preset = found.presets[name]
            lora = read_lora(preset.path, found.family, preset.name, "preset_lora_path")
            require_fit(module, lora, f"preset_lora_path = {preset.path}")
            _warn_of_rest(lora, preset.path, preset.name, warn)
        for base in config.lora_base_model:
            part = found.family.part(base)
            if part.of != name:
                continue
            _held(part, module, f"lora_base_model; {item.entry.text}")
            targets = lora_targets(config, found.family, module, base)
            lora = _read_start(config, found.family, module, base, targets)
            if isinstance(lora, LoraFile):
                _warn_of_rest(lora, config.lora_checkpoint, base, warn)
            if config.lora_method in ("lora", "dora"):
                layers = {name: module.get_submodule(name) for name in targets}
                check_formats(config, found.family, base, item, layers)
            shapes = adapter_shapes(config, module, targets)
            if isinstance(lora, AdapterFile):
                require_values(lora, config.adapter, shapes, _start_of(config))
            size += sum(map(math.prod, shapes.values())) * torch.float32.itemsize
    return size


def _warn_of_rest(lora: LoraFile, path: object, name: str, warn: Callable[[str], None]) -> None:
    """Say what of a LoRA file is not used."""
    if lora.left_out:
        others = ", ".join(f"'{other}'" for other in lora.left_out)
        warn(f"{path} holds a LoRA of {others} as well; only that of '{name}' is used")


def _require_decoders(found: ResolvedModel) -> None:
    for name in found.family.decoder:
        require_component(found, name)
        item = found.components[name]
        if item.lacks:
            raise WeightsError(
                f"the files of '{name}' hold no {item.lacks[0]}, which sample images need",
                where=item.entry.text,
                do="name the whole files, or leave the samples out",
            )


def _held(part: Part, module: nn.Module, where: str) -> list[nn.Parameter]:
    """The weights of a part of a component. Raises `ParameterError` where the model has none."""
    held = [p for n, p in module.named_parameters() if part.holds(n)]
    if not held:
        raise ParameterError(
            f"the model has no '{part.name}'",
            where=where,
            do="leave it out there, or give the files of a model that has it",
        )
    return held


def usual_targets(base: str, family: Family) -> tuple[str, ...]:
    """The layers that get a LoRA when none are named. Raises `TargetError` if there are none."""
    rules = family.part(base).lora
    if rules is None:
        loadable = [name for name in family.trainable if family.part(name).lora is not None]
        raise TargetError(
            f"no tool loads a LoRA into the '{base}' of {family.name}",
            where="lora_base_model",
            do=f"give {' or '.join(loadable)}, or train it in full as trainable_models",
        )
    return rules.targets


def lora_target_names(config: TrainingConfig, family: Family, base: str) -> tuple[str, ...]:
    """What says which layers of a component or part get a LoRA: names, ends of names, or none for
    automatic ones.

    Where several models get one, a target that is among the usual ones of some of them is meant
    for these alone.

    Raises:
        TargetError: none are named, and there are no usual ones.
    """
    named, usual = config.lora_target_modules, usual_targets(base, family)
    if named is None:
        return usual
    others = {t for b in config.lora_base_model if b != base for t in usual_targets(b, family)}
    own = {*usual, *family.lora_rules(base).aliases}
    return tuple(target for target in named if target in own or target not in others)


def lora_targets(config: TrainingConfig, family: Family, module: nn.Module, base: str) -> list[str]:
    """Full names of the layers of a component or part that get the LoRA, in the order of the module.

    Raises:
        TargetError: a target matches no layer, or automatic targets find none.
    """
    part, kinds = family.part(base), (nn.Linear, nn.Conv2d)
    layers = [n for n, m in module.named_modules() if isinstance(m, kinds) and part.holds(n)]
    targets = lora_target_names(config, family, base)
    if config.lora_target_modules and not targets:
        raise TargetError(
            f"no LoRA target is for '{base}'",
            where="lora_target_modules",
            do="name layers of it too, or leave it out of lora_base_model",
        )
    if not targets:
        return [name for name in _automatic_targets(module) if part.holds(name)]
    aliases = family.lora_rules(base).aliases
    for target in targets:
        if not any(_matches(name, target, aliases) for name in layers):
            ends = {".".join(n.split(".")[-k:]) for n in layers for k in (1, 2)}
            hint = nearest(target, ends | aliases.keys())
            raise TargetError(
                f"the LoRA target '{target}' matches no layer of '{base}'"
                + (f"; {hint}" if hint else ""),
                where="lora_target_modules",
                do="its layers end with " + ", ".join(sorted({n.split(".")[-1] for n in layers})),
            )
    return [name for name in layers if any(_matches(name, t, aliases) for t in targets)]


def _matches(name: str, target: str, aliases: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether a layer is meant by a target: by an alias first, else by its name or its end."""
    if target in aliases:
        return any(fnmatchcase(name, glob) for glob in aliases[target])
    return name == target or name.endswith(f".{target}")


def _automatic_targets(module: nn.Module) -> list[str]:
    """Linear layers of at least 512 features both ways inside the repeated blocks: lists of two
    modules and more, as DiffSynth-Studio searches them (`auto_detect_lora_target_modules`).

    A list of one repeats nothing. So in the middle of Stable Diffusion 1.5, which has one
    transformer block, only the lists inside the block count: the layers of its feed-forward and
    the last ones of its attentions, and not their queries, keys and values.
    """
    lists = [n for n, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    found = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        and min(layer.in_features, layer.out_features) >= AUTO_MIN_FEATURES
        and any(name.startswith(f"{prefix}.") for prefix in lists)
    ]
    if not found:
        raise TargetError(
            f"no Linear layer of a repeated block has {AUTO_MIN_FEATURES} features both ways",
            where="lora_target_modules (empty: automatic)",
            do="name the layers",
        )
    return found


def add_lora(config: TrainingConfig, family: Family, module: nn.Module, base: str) -> list[str]:
    """Put LoRA layers, or those of another method (float32), into the module of a component, or into
    a part of it; returns the names of the layers that got one.

    The initial values depend on the seed alone, or are those of `lora_checkpoint`.

    Raises:
        TargetError: see `lora_targets`.
        WeightsError: see `_read_start`.
    """
    targets = lora_targets(config, family, module, base)
    start = _read_start(config, family, module, base, targets)
    add_adapter(config, module, targets)
    if isinstance(start, LoraFile):
        start_lora(module, start, config.alpha / config.lora_rank)
    elif start is not None:
        trained = {saved_name(n): p for n, p in module.named_parameters() if is_adapter(n)}
        shapes = {name: tuple(parameter.shape) for name, parameter in trained.items()}
        require_values(start, config.adapter, shapes, _start_of(config))
        start_adapter(trained, start, config.adapter)
    return targets


def _read_start(
    config: TrainingConfig, family: Family, module: nn.Module, base: str, targets: Sequence[str]
) -> LoraFile | AdapterFile | None:
    """What `lora_checkpoint` names, where it is given.

    Raises:
        WeightsError: it is not a LoRA of these targets and of `lora_rank`; or, where `lora_method` is
            another, it cannot be read: whether it fits is for `require_values`.
    """
    if config.lora_checkpoint is None:
        return None
    path = Path(config.lora_checkpoint)
    if config.lora_method != "lora":
        return read_adapter(path, family, base, "lora_checkpoint")
    lora = read_lora(path, family, base, "lora_checkpoint")
    if family.parts:  # the file holds the LoRAs of all parts of a component as one
        held = [layer for layer in lora.down if family.part(base).holds(layer)]
        own = lora.part({layer: layer for layer in held})
        lora = replace(lora, down=own.down, up=own.up, scale=own.scale)
    require_start(module, lora, targets, config.lora_rank, _start_of(config))
    return lora


def _start_of(config: TrainingConfig) -> str:
    return f"lora_checkpoint = {config.lora_checkpoint}"


def train_fully(module: nn.Module, part: Part, dtype: torch.dtype = torch.float32) -> None:
    """Make the parameters of a component, or of a part of it, trainable, in an element type."""
    for name, parameter in module.named_parameters():
        if part.holds(name) and not is_adapter(name):
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(True)


def checkpoint_gradients(module: nn.Module, required: bool = True) -> None:
    """Switch gradient checkpointing on, where the architecture has it.

    Raises:
        ParameterError: it has none, and it is required.
    """
    for name in ("enable_gradient_checkpointing", "gradient_checkpointing_enable"):
        switch = getattr(module, name, None)
        if callable(switch) and getattr(module, "_supports_gradient_checkpointing", True):
            switch()
            return
    if not required:
        return
    raise ParameterError(
        f"{type(module).__name__} has no gradient checkpointing",
        where="use_gradient_checkpointing",
        do="leave it out",
    )


@contextmanager
def evaluating(module: nn.Module) -> Generator[None]:
    """A module in evaluation mode; afterwards each module inside has its own mode back."""
    modes = {inside: inside.training for inside in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for inside, mode in modes.items():
            inside.training = mode


def weight_norms(components: Iterable[tuple[str, nn.Module]]) -> dict[str, dict[str, float]]:
    """Component → layer with a LoRA → the Frobenius norm of its weights, to six digits."""
    norms: dict[str, dict[str, float]] = {}
    for name, component in components:
        for layer, module in component.named_modules():
            if isinstance(module, LoraLayer):
                weight: Any = module.get_base_layer().weight
                norm = float(weight.detach().float().norm())
                norms.setdefault(name, {})[layer] = float(f"{norm:.6g}")
    return norms


def fingerprints(parameters: Iterable[tuple[str, torch.Tensor]]) -> dict[str, tuple[float, float]]:
    """A cheap mark of each tensor's values, to find out afterwards whether they changed."""
    return {
        name: (float(p.detach().double().sum()), float(p.detach().double().abs().sum()))
        for name, p in parameters
    }
