"""The loaded components of a model, loaded when first asked for and freed when told."""

import gc
from collections.abc import Iterable
from typing import Any

import torch

from diffsynth_dagster.data.facts import FactBook, digest_of
from diffsynth_dagster.errors import WeightsError
from diffsynth_dagster.weights.identify import FoundModel
from diffsynth_dagster.weights.load import load_component


class Models:
    """Loads components and tokenizers by name.

    Args:
        device, dtype: of the loaded weights.
        on_cpu_first: read weights into CPU memory before they are moved to the device.
    """

    def __init__(
        self, found: FoundModel, device: torch.device, dtype: torch.dtype, on_cpu_first: bool
    ) -> None:
        self.found = found
        self.device = device
        self.dtype = dtype
        self._on_cpu_first = on_cpu_first
        self._loaded: dict[str, Any] = {}

    def get(self, names: Iterable[str]) -> dict[str, Any]:
        """The components of these names, in the order given.

        Raises:
            WeightsError: the model list lacks one, or its files are damaged.
        """
        return {name: self._get(name) for name in names}

    def _get(self, name: str) -> Any:
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def _load(self, name: str) -> Any:
        if name in self.found.tokenizers:
            folder = self.found.tokenizers[name]
            load = next(t.load for t in self.found.family.tokenizers if t.name == name)
            try:
                return load(str(folder))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise WeightsError(
                    f"the {name} cannot be loaded: {error}",
                    where=str(folder),
                    do="name the folder that holds its files",
                ) from error
        require_component(self.found, name)
        where = "cpu" if self._on_cpu_first else self.device
        return load_component(self.found.components[name], where, self.dtype).to(self.device)

    def free(self, names: Iterable[str]) -> None:
        """Forget components, giving their memory back."""
        for name in names:
            self._loaded.pop(name, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def require_component(found: FoundModel, name: str) -> None:
    """Raise a `WeightsError` when the model list lacks a component."""
    if name in found.components or name in found.tokenizers:
        return
    have = ", ".join(f"{c} ({f.entry.text})" for c, f in found.components.items())
    raise WeightsError(
        f"the model list lacks the component '{name}'",
        where=f"model_paths, model_id_with_origin_paths; they give {have or 'nothing'}",
        do=f"add the files of {found.family.name}'s {found.family.component(name).folder}",
    )


def component_digest(found: FoundModel, name: str, book: FactBook) -> str:
    """Content of the files of a component or tokenizer: names do not matter, bytes do.

    Raises:
        WeightsError: the model list lacks it.
    """
    require_component(found, name)
    return digest_of([book.digest(path) for path in found.files(name)])
