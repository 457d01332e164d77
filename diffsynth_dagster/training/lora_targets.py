"""Which layers of a component get a LoRA."""

from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import TargetError, nearest
from diffsynth_dagster.families.contract import Family

AUTO_MIN_FEATURES = 512
"""Fewest input and output features of a layer that is targeted automatically."""


def usual_targets(base: str, family: Family) -> tuple[str, ...]:
    """The layers that get a LoRA if none are named. Raises `TargetError`: no tool would load it."""
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
    """The LoRA targets of a component or part: names of layers, ends of names, or aliases. Empty
    for automatic targets.

    If several components get a LoRA, a target that is usual for some of them applies only to those.

    Raises:
        TargetError: no tool loads a LoRA into this component or part.
    """
    named, usual = config.lora_target_modules, usual_targets(base, family)
    if named is None:
        return usual
    others = {t for b in config.lora_base_model if b != base for t in usual_targets(b, family)}
    known = {*usual, *family.lora_rules(base).aliases}
    return tuple(target for target in named if target in known or target not in others)


def lora_targets(config: TrainingConfig, family: Family, module: nn.Module, base: str) -> list[str]:
    """Full names of the layers of a component or part that get the LoRA, in the module's order.

    Args:
        module: of the component; it may be on the meta device.

    Raises:
        TargetError: a target matches no layer, or there are no automatic targets.
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
    # Each target must match: a misspelt one would silently train less.
    for target in targets:
        if not any(_matches(name, target, aliases) for name in layers):
            # The last one or two parts of the names, as people write targets: to_q, attn.to_q.
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
    """Whether a target selects a layer: an alias by its globs, any other by the end of the name."""
    if target in aliases:
        return any(fnmatchcase(name, glob) for glob in aliases[target])
    return name == target or name.endswith(f".{target}")


def _automatic_targets(module: nn.Module) -> list[str]:
    """Linear layers with at least 512 input and output features inside repeated blocks, as in
    DiffSynth-Studio (`auto_detect_lora_target_modules`).

    A repeated block is a module list of two or more. So in the middle block of Stable Diffusion
    1.5, which has one transformer block, only the lists inside that block count. They hold the
    feed-forward layers and the output layers of the attentions, but not the queries, keys and
    values.
    """
    lists = [n for n, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    names = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        and min(layer.in_features, layer.out_features) >= AUTO_MIN_FEATURES
        and any(name.startswith(f"{prefix}.") for prefix in lists)
    ]
    if not names:
        raise TargetError(
            f"no Linear layer of a repeated block has {AUTO_MIN_FEATURES} features both ways",
            where="lora_target_modules (empty: automatic)",
            do="name the layers",
        )
    return names
