"""The registry of model families: one line for each."""

import logging
from collections.abc import Iterable
from importlib import import_module

from diffsynth_dagster.config.unsupported import FAMILIES
from diffsynth_dagster.errors import ParameterError, nearest
from diffsynth_dagster.families.contract import Family

# diffusers imports image processors that transformers only has with torchvision installed. For each
# of them transformers warns that it falls back to another one. We use none of them.
logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)

_MODULES: dict[str, str] = {}
_REPOSITORIES: dict[str, tuple[str, ...]] = {}


def register(name: str, *repositories: str) -> None:
    """Register the family that `families/<name>/family.py` defines as `FAMILY`.

    The module is imported at its first use, because it imports diffusers and transformers.

    Args:
        repositories: prefixes of the names of its repositories on the hub. They identify the family
            of a model list before anything is downloaded or imported.
    """
    if name in _MODULES:
        raise AssertionError(f"the family '{name}' is registered twice")
    _MODULES[name] = f"{__name__}.{name}.family"
    _REPOSITORIES[name] = repositories


# `family_of` returns the first match, so a prefix must not match another family's repository.
register("qwen_image", "Qwen/Qwen-Image", "FireRedTeam/FireRed-Image-Edit")
register("flux", "black-forest-labs/FLUX.1")
register("wanvideo", "Wan-AI/Wan2", "PAI/Wan2", "krea/krea-realtime-video")
register("stable_diffusion", "AI-ModelScope/stable-diffusion-v1-5")
register("ltx2", "Lightricks/LTX-2", "DiffSynth-Studio/LTX-2")
register("stable_diffusion_xl", "stabilityai/stable-diffusion-xl-base-1.0")


def family_names() -> tuple[str, ...]:
    """The registered families."""
    return tuple(_MODULES)


def repositories_of(name: str) -> tuple[str, ...]:
    """The prefixes of the names of a family's repositories on the hub."""
    return _REPOSITORIES[name]


def family_of(texts: Iterable[str]) -> str | None:
    """The family whose repository a model list names; None if it names none. Imports no family.

    Args:
        texts: the repository of each entry, or its path.
    """
    entries = tuple(texts)
    matches = (
        name
        for name, prefixes in _REPOSITORIES.items()
        if prefixes and any(text.startswith(prefixes) for text in entries)
    )
    return next(matches, None)


def find_family(name: str) -> Family:
    """The family with this name, imported on demand.

    Raises:
        ParameterError: there is no family of this name, or it is not supported yet.
    """
    if name in _MODULES:
        family = import_module(_MODULES[name]).FAMILY
        assert isinstance(family, Family)
        assert family.name == name
        return family
    known = ", ".join(_MODULES)
    if name in FAMILIES:
        raise ParameterError(
            f"the family '{name}' is not supported yet", where="family", do=f"one of: {known}"
        )
    hint = nearest(name, (*_MODULES, *FAMILIES))
    raise ParameterError(
        f"unknown family '{name}'" + (f"; {hint}" if hint else ""),
        where="family",
        do=f"one of: {known}",
    )


def each_family() -> list[Family]:
    """Every registered family, imported."""
    return [find_family(name) for name in _MODULES]


__all__ = [
    "Family",
    "each_family",
    "family_names",
    "family_of",
    "find_family",
    "register",
    "repositories_of",
]
