"""The components of a model: loaded at their first use, kept, and freed on request."""

import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffsynth_dagster.errors import WeightsError
from diffsynth_dagster.facts import FactCache, digest_of
from diffsynth_dagster.families.contract import Tokenizer
from diffsynth_dagster.weights.float8 import store_in_float8
from diffsynth_dagster.weights.load import load_component
from diffsynth_dagster.weights.lora import fuse_lora, read_lora
from diffsynth_dagster.weights.resolved import ResolvedModel


class Models:
    """Loads components and tokenizers by name.

    Args:
        device, dtype: of the loaded weights.
        float8_later: components of the model list's float8 ones that are loaded into CPU memory in
            `dtype`: LoRA layers are added to them first, and the caller then stores them in float8;
            see `store_in_float8`.
        on_cpu_first: read weights into CPU memory before they are moved to the device.
    """

    def __init__(
        self,
        model: ResolvedModel,
        device: torch.device,
        dtype: torch.dtype,
        on_cpu_first: bool,
        float8_later: frozenset[str] = frozenset(),
    ) -> None:
        self.resolved = model
        self.device = device
        self.dtype = dtype
        self._on_cpu_first = on_cpu_first
        self._float8_later = float8_later
        self._loaded: dict[str, Any] = {}

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The components that are loaded."""
        return {n: m for n, m in self._loaded.items() if isinstance(m, nn.Module)}

    def get(self, names: Iterable[str]) -> dict[str, Any]:
        """The components of these names, in the order given.

        Raises:
            WeightsError: the model list lacks one, or its files are damaged, or no longer what was
                digested.
        """
        return {name: self._get(name) for name in names}

    def _get(self, name: str) -> Any:
        if name not in self._loaded:
            self.resolved.require_unchanged(name)
            loaded = self._load(name)
            self.resolved.require_unchanged(name)  # nor while it was read
            self._loaded[name] = loaded
        return self._loaded[name]

    def _load(self, name: str) -> Any:
        if name in self.resolved.tokenizers:
            return load_tokenizer(self.resolved, name)
        require_component(self.resolved, name)
        stored = self.resolved.is_float8(name)
        where = "cpu" if self._on_cpu_first or stored else self.device
        moves = self.device.type != "cpu"
        module = load_component(self.resolved.components[name], where, self.dtype, mapped=moves)
        if name in self.resolved.presets:
            preset = self.resolved.presets[name]
            lora = read_lora(preset.path, self.resolved.family, preset.name, "preset_lora_path")
            fuse_lora(module, lora, f"preset_lora_path = {preset.path}")
        if not stored:
            return module.to(self.device)
        if name not in self._float8_later:
            store_in_float8(module, self.dtype, self.device)
        return module

    def free(self, names: Iterable[str]) -> None:
        """Drop components, so that their memory is free again."""
        dropped = [self._loaded.pop(name, None) for name in names]
        if not any(module is not None for module in dropped):
            return
        del dropped
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def load_tokenizer(model: ResolvedModel, name: str) -> Any:
    """A tokenizer of a model.

    Raises:
        WeightsError: it cannot be loaded, or is not whole.
    """
    folder = model.tokenizers[name]
    tokenizer = next(t for t in model.family.tokenizers if t.name == name)
    try:
        loaded = tokenizer.load(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"the {name} cannot be loaded: {error}",
            where=str(folder),
            do="name the folder that holds its files",
        ) from error
    _require_tokens(tokenizer, loaded, folder)
    return loaded


def _require_tokens(tokenizer: Tokenizer, loaded: Any, folder: Path) -> None:
    """Check that a tokenizer knows its markers and common words. One that was loaded from an
    incomplete folder does not, and would encode every caption as unknown tokens.

    Raises:
        WeightsError: it lacks some.
    """

    def ids(text: str) -> list[int]:
        return loaded(text, add_special_tokens=False).input_ids

    if not tokenizer.markers:
        return
    split = [marker for marker in tokenizer.markers if len(ids(marker)) != 1]
    if split or not set(ids("a photograph")) - {loaded.unk_token_id}:
        raise WeightsError(
            f"the {tokenizer.name} is not whole: it knows no "
            + (f"'{split[0]}'" if split else "word of a caption"),
            where=str(folder),
            do="name the folder that holds all of its files, or download them again",
        )


def require_component(model: ResolvedModel, name: str) -> None:
    """Raise a `WeightsError` when the model list lacks a component."""
    if name in model.components or name in model.tokenizers:
        return
    have = ", ".join(f"{c} ({f.entry.text})" for c, f in model.components.items())
    raise WeightsError(
        f"the model list lacks the component '{name}'",
        where=f"model_paths, model_id_with_origin_paths; they give {have or 'nothing'}",
        do=f"add the files of {model.family.name}'s {model.family.component(name).names.folder}",
    )


def component_digest(model: ResolvedModel, name: str, fact_cache: FactCache) -> str:
    """Digest of what a component or tokenizer computes with: the bytes of its files (whatever their
    names), of a LoRA that is fused into it, and whether it is stored in float8.

    Raises:
        WeightsError: the model list lacks it, or a file changed since it was found.
    """
    require_component(model, name)
    digests = model.contents.digests(name, model.files(name), fact_cache)
    return digest_of([*digests, "float8"] if model.is_float8(name) else digests)
