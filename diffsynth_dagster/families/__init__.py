"""The registry of model families: one line for each."""

import logging
from importlib import import_module

from diffsynth_dagster.config.unsupported import FAMILIES
from diffsynth_dagster.errors import ParameterError, nearest
from diffsynth_dagster.families.contract import Family

# diffusers imports image processors by names that transformers has only with torchvision, and for
# each of them a warning says that another one is taken. None of them is used here.
logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)

_MODULES: dict[str, str] = {}


def register(name: str, module: str) -> None:
    """Register a family: `module` defines `FAMILY`, and is imported at its first use."""
    if name in _MODULES:
        raise AssertionError(f"the family '{name}' is registered twice")
    _MODULES[name] = module


register("qwen_image", "diffsynth_dagster.families.qwen_image.family")
register("flux", "diffsynth_dagster.families.flux.family")
register("wanvideo", "diffsynth_dagster.families.wanvideo.family")
register("stable_diffusion", "diffsynth_dagster.families.stable_diffusion.family")
register("ltx2", "diffsynth_dagster.families.ltx2.family")
register("stable_diffusion_xl", "diffsynth_dagster.families.stable_diffusion_xl.family")


def family_names() -> tuple[str, ...]:
    """The registered families."""
    return tuple(_MODULES)


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


__all__ = ["Family", "each_family", "family_names", "find_family", "register"]
