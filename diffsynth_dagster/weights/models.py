"""Load the components of a model when they are first used, keep them, and free them on request."""

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
        on_cpu_first: whether to read weights into CPU memory before moving them to the device.
        float8_later: float8 components that stay in CPU memory in `dtype`: the caller adds LoRA
            layers, and then calls `store_in_float8`.
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
        """The loaded components, without tokenizers."""
        return {n: m for n, m in self._loaded.items() if isinstance(m, nn.Module)}

    def get(self, names: Iterable[str]) -> dict[str, Any]:
        """The components and tokenizers of these names, in the given order; loaded if needed.

        Raises:
            WeightsError: the model list lacks one, or its files are damaged or have changed since
                they were digested.
        """
        return {name: self._get(name) for name in names}

    def _get(self, name: str) -> Any:
        if name not in self._loaded:
            self.resolved.require_unchanged(name)
            loaded = self._load(name)
            self.resolved.require_unchanged(name)  # the file may change while it is read
            self._loaded[name] = loaded
        return self._loaded[name]

    def _load(self, name: str) -> Any:
        if name in self.resolved.tokenizers:
            return load_tokenizer(self.resolved, name)
        require_component(self.resolved, name)
        is_float8 = self.resolved.is_float8(name)
        # A float8 component may be too large for the device in `dtype`.
        where = "cpu" if self._on_cpu_first or is_float8 else self.device
        moves = self.device.type != "cpu"  # then weights need not be copied from the mapped file
        module = load_component(self.resolved.components[name], where, self.dtype, mapped=moves)
        # Before float8: the LoRA is added in full precision.
        if name in self.resolved.presets:
            preset = self.resolved.presets[name]
            lora = read_lora(preset.path, self.resolved.family, preset.name, "preset_lora_path")
            fuse_lora(module, lora, f"preset_lora_path = {preset.path}")
        if not is_float8:
            return module.to(self.device)
        if name not in self._float8_later:
            store_in_float8(module, self.dtype, self.device)
        return module

    def free(self, names: Iterable[str]) -> None:
        """Drop components and free their memory."""
        dropped = [self._loaded.pop(name, None) for name in names]
        if not any(module is not None for module in dropped):
            return
        del dropped
        gc.collect()  # modules have reference cycles, which keep their tensors alive
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # else PyTorch keeps the blocks, in sizes that may not fit


def load_tokenizer(model: ResolvedModel, name: str) -> Any:
    """Load a tokenizer of a model.

    Raises:
        WeightsError: it cannot be loaded, or its files are incomplete.
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
    """Check that a tokenizer knows its markers and common words.

    From an incomplete folder, transformers loads a tokenizer with an empty vocabulary, which
    encodes every caption as unknown tokens.

    Raises:
        WeightsError: a marker or all words are unknown.
    """

    def ids(text: str) -> list[int]:
        return loaded(text, add_special_tokens=False).input_ids

    if not tokenizer.markers:
        return
    # A known marker is one token; an unknown one is split like other text.
    split = [marker for marker in tokenizer.markers if len(ids(marker)) != 1]
    if split or not set(ids("a photograph")) - {loaded.unk_token_id}:
        raise WeightsError(
            f"the {tokenizer.name} is not whole: it knows no "
            + (f"'{split[0]}'" if split else "word of a caption"),
            where=str(folder),
            do="name the folder that holds all of its files, or download them again",
        )


def require_component(model: ResolvedModel, name: str) -> None:
    """Raise `WeightsError` if the model list lacks a component."""
    if name in model.components or name in model.tokenizers:
        return
    have = ", ".join(f"{c} ({f.entry.text})" for c, f in model.components.items())
    raise WeightsError(
        f"the model list lacks the component '{name}'",
        where=f"model_paths, model_id_with_origin_paths; they give {have or 'nothing'}",
        do=f"add the files of {model.family.name}'s {model.family.component(name).names.folder}",
    )


def component_digest(model: ResolvedModel, name: str, fact_cache: FactCache) -> str:
    """Digest of everything that the outputs of a component or tokenizer depend on.

    That is the bytes of its files and of a fused LoRA, and whether it is stored in float8.

    Raises:
        WeightsError: the model list lacks it, or a file changed since it was found.
    """
    require_component(model, name)
    # File names are not part of it: renaming or moving a model keeps encoded samples valid.
    digests = model.contents.digests(name, model.files(name), fact_cache)
    return digest_of([*digests, "float8"] if model.is_float8(name) else digests)
