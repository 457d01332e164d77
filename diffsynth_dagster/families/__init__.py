"""The registry of model families: one line for each."""

import logging
from collections.abc import Iterable
from importlib import import_module

from diffsynth_dagster.config.unsupported import FAMILIES
from diffsynth_dagster.errors import ParameterError, nearest
from diffsynth_dagster.families.contract import Family

# diffusers imports image processors by names that transformers has only with torchvision, and for
# each of them a warning says that another one is taken. None of them is used here.
logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)

_MODULES: dict[str, str] = {}
_REPOSITORIES: dict[str, tuple[str, ...]] = {}


def register(name: str, *repositories: str) -> None:
    """Register a family: `families/<name>/family.py` defines `FAMILY`, and is imported at its first use.

    Args:
        repositories: how the names of its repositories on the hub start. They show the family of a
            model list before any file is there, and before any family is imported.
    """
    if name in _MODULES:
        raise AssertionError(f"the family '{name}' is registered twice")
    _MODULES[name] = f"{__name__}.{name}.family"
    _REPOSITORIES[name] = repositories


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
    """How the names of a registered family's repositories on the hub start."""
    return _REPOSITORIES[name]


def family_of(texts: Iterable[str]) -> str | None:
    """The first family one of whose repositories is named in a model list; None where none is. No
    family is imported.

    Args:
        texts: the repository of each entry, or its path.
    """
    given = tuple(texts)
    named = (
        name
        for name, starts in _REPOSITORIES.items()
        if starts and any(text.startswith(starts) for text in given)
    )
    return next(named, None)


def find_family(name: str) -> Family:
    """The family of this name.

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
