"""Load a component: build the module on the meta device, then assign the tensors of its files."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from diffsynth_dagster.errors import WeightsError, reason_of
from diffsynth_dagster.facts import digest_of
from diffsynth_dagster.families.contract import Component, Shapes
from diffsynth_dagster.weights.resolved import ComponentFiles
from diffsynth_dagster.weights.torch_file import read_torch_file

_TRIED: set[str] = set()
"""Digests of the architectures that were built in this process and fit their files."""


def read_tensors(paths: Sequence[Path], start: str = "") -> dict[str, torch.Tensor]:
    """Read the tensors of the shards of one model into CPU memory.

    Args:
        start: read only tensors whose names start with this, and remove it from the names.

    Raises:
        WeightsError: a shard is damaged, or a weight in it is NaN or infinite.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        shard: dict[str, torch.Tensor]
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt") as file:
                    names = [name for name in file.keys() if name.startswith(start)]  # noqa: SIM118
                    shard = {name: file.get_tensor(name) for name in names}
            except (SafetensorError, OSError) as error:
                raise WeightsError(
                    f"the model file cannot be read: {error}",
                    where=str(path),
                    do="download or copy it again",
                ) from error
        else:
            whole = read_torch_file(path)
            shard = {name: whole[name] for name in whole if name.startswith(start)}
        for name, tensor in shard.items():
            if not is_finite(tensor):
                raise WeightsError(
                    f"the weights of '{name}' hold NaN or infinity",
                    where=str(path),
                    do="download or copy the file again; the training that wrote it may have "
                    "diverged",
                )
        tensors |= shard
    return {name.removeprefix(start): tensor for name, tensor in tensors.items()}


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.element_size() == 1:  # float8 has no comparisons
        tensor = tensor.to(torch.float32)
    # aminmax passes NaN on and needs no mask in memory, as isfinite(tensor) would.
    least, most = torch.aminmax(tensor)
    return math.isfinite(least) and math.isfinite(most)


def require_buildable(files: ComponentFiles) -> None:
    """Check that a component's architecture can be built and fits its files.

    No weights are read, and nothing is allocated. Each architecture is tried once in a process.

    Raises:
        WeightsError: it cannot be built, or its tensors have other names or shapes than the files'.
    """
    shapes = files.shapes
    architecture = architecture_of(files)
    if architecture in _TRIED:
        return
    # Buffers are on the meta device too, unlike in `build_empty`: a config.json with wrong sizes
    # allocates nothing.
    with torch.device("meta"):
        tried = _build(files, shapes)
    _check_names(files, shapes, tried)
    _TRIED.add(architecture)


def build_empty(files: ComponentFiles) -> nn.Module:
    """Build the module of a component with its parameters on the meta device.

    Raises:
        WeightsError: see `require_buildable`.
    """
    require_buildable(files)
    # Buffers that are computed (frequencies of positions) are not in the files: they need values.
    with init_empty_weights(include_buffers=False):
        return _build(files, files.shapes)


def architecture_of(files: ComponentFiles) -> str:
    """Digest of everything that determines a component's module: class, settings and shapes."""
    component, shapes = files.component, files.shapes
    kind = component.construction.kind_of(shapes)
    fixed = {name: repr(value) for name, value in component.construction.fixed.items()}
    settings = [component.name, kind.__module__, kind.__qualname__, fixed, files.config]
    return digest_of([*settings, files.lacks, sorted(shapes.items())])


def build(component: Component, shapes: Shapes, config: Mapping[str, object] | None) -> nn.Module:
    """Build the diffusers or transformers module of a component, without initialising its weights.

    Args:
        shapes: tensor name of the module → shape.
        config: the component's config.json; if None, the settings are derived from the shapes.

    Raises:
        KeyError, TypeError, ValueError: the settings or shapes do not describe such a module.
    """
    construction = component.construction
    kind: Any = construction.kind_of(shapes)
    settings = construction.settings(shapes) if config is None else dict(config)
    settings |= construction.fixed
    with no_init_weights():  # initialising takes most of the time, and the values are overwritten
        if issubclass(kind, PreTrainedModel):
            make: Any = kind.config_class
            # `from_dict` also understands old and nested settings, which a config.json may have.
            return kind(make(**settings) if config is None else make.from_dict(settings))
        if config is None:
            return kind(**settings)
        # Names with an underscore are diffusers' notes about the file, not settings.
        return kind.from_config({k: v for k, v in settings.items() if not k.startswith("_")})


def _build(files: ComponentFiles, shapes: Shapes) -> nn.Module:
    """Build the module of a component, without the optional modules that its files do not have.
    Raises `WeightsError`."""
    try:
        module = build(files.component, shapes, files.config)
        for part in files.lacks:
            setattr(module, part, None)
    except Exception as error:
        raise WeightsError(
            f"the architecture of '{files.component.name}' cannot be built: {reason_of(error)}",
            where=files.entry.text,
            do="check the config.json beside the files"
            if files.config is not None
            else "name every shard of the model and nothing else",
        ) from error
    return module


def _check_names(files: ComponentFiles, shapes: Shapes, module: nn.Module) -> None:
    """Compare names and shapes of the files' tensors with the module's. Raises `WeightsError`."""
    expected = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    tied = getattr(module, "all_tied_weights_keys", None) or {}  # saved once, under another name
    missing = [name for name in expected if name not in shapes and name not in tied]
    unexpected = [name for name in shapes if name not in expected]
    wrong = [
        f"{name} is {shapes[name]}, not {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    problems = [
        f"{kind}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if names[3:] else "")
        for kind, names in (("missing", missing), ("unknown", unexpected), ("shapes", wrong))
        if names
    ]
    if problems:
        raise WeightsError(
            f"the files are not a whole '{files.component.name}': " + "; ".join(problems),
            where=files.entry.text,
            do="name every shard of the model and nothing else"
            + (", and put its own config.json beside them" if files.config is not None else ""),
        )


def load_component(
    files: ComponentFiles, device: torch.device | str, dtype: torch.dtype, mapped: bool = False
) -> nn.Module:
    """Build a component and load its weights: frozen and in evaluation mode.

    Args:
        device: where the weights are put.
        dtype: of floating-point parameters; modules that the architecture keeps in float32 stay so.
        mapped: whether weights on the CPU may stay memory-mapped. They then change with the file,
            so this is only for a caller that moves them to another device at once.

    Raises:
        WeightsError: see `build_empty` and `read_tensors`.
    """
    module = build_empty(files)
    keep: Sequence[str] = getattr(module, "_keep_in_fp32_modules", None) or ()
    state = files.component.construction.convert(read_tensors(files.files, files.start))
    for name, tensor in state.items():
        # As diffusers matches them: a module's name anywhere in the path.
        kept = any(part in keep for part in name.split("."))
        target = torch.float32 if kept else dtype
        target = target if tensor.is_floating_point() else tensor.dtype
        # Without a copy, a tensor on the CPU stays mapped, and changes if the file is overwritten.
        state[name] = tensor.to(device, target, copy=not mapped)
    _assign(module, state)
    return module.to(device).eval().requires_grad_(False)


def _assign(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Replace a module's meta tensors by loaded ones."""
    # Not strict: tied weights are not in the files. `_check_names` has compared the rest.
    module.load_state_dict(state, strict=False, assign=True)
    tie = getattr(module, "tie_weights", None)
    if callable(tie):
        tie()
    # A parameter on the meta device would fail much later, with an unclear error.
    left = [name for name, p in module.named_parameters() if p.is_meta]
    assert not left, f"parameters without weights: {left[:3]}"
