"""From files to a module: built on the meta device, then given its tensors."""

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
"""The architectures that were tried in this process, and fit their files."""


def read_tensors(paths: Sequence[Path], start: str = "") -> dict[str, torch.Tensor]:
    """The tensors of the shards of one model, in CPU memory.

    Args:
        start: only those whose names start so are read, by the rest of their names.

    Raises:
        WeightsError: a shard is damaged, or a weight in it is NaN or infinite.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        own: dict[str, torch.Tensor]
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt") as file:
                    names = [name for name in file.keys() if name.startswith(start)]  # noqa: SIM118
                    own = {name: file.get_tensor(name) for name in names}
            except (SafetensorError, OSError) as error:
                raise WeightsError(
                    f"the model file cannot be read: {error}",
                    where=str(path),
                    do="download or copy it again",
                ) from error
        else:
            whole = read_torch_file(path)
            own = {name: whole[name] for name in whole if name.startswith(start)}
        for name, tensor in own.items():
            if not is_finite(tensor):
                raise WeightsError(
                    f"the weights of '{name}' hold NaN or infinity",
                    where=str(path),
                    do="download or copy the file again; the training that wrote it may have diverged",
                )
        tensors |= own
    return {name.removeprefix(start): tensor for name, tensor in tensors.items()}


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.element_size() == 1:  # float8 cannot be compared
        tensor = tensor.to(torch.float32)
    # NaN goes through both, as fast as memory is read.
    least, most = torch.aminmax(tensor)
    return math.isfinite(least) and math.isfinite(most)


def require_buildable(files: ComponentFiles) -> None:
    """Check that the architecture of a component can be built and is that of its files, with nothing in
    memory at all: a configuration of other sizes than the files have is refused before it costs anything.
    Each architecture is tried once.

    Raises:
        WeightsError: it cannot be built, or lacks tensors that the files should have.
    """
    shapes = files.shapes
    architecture = architecture_of(files)
    if architecture in _TRIED:
        return
    with torch.device("meta"):
        tried = _build(files, shapes)
    _check_names(files, shapes, tried)
    _TRIED.add(architecture)


def build_empty(files: ComponentFiles) -> nn.Module:
    """The module of a component with its parameters on the meta device, where they take no memory.

    Raises:
        WeightsError: see `require_buildable`.
    """
    require_buildable(files)
    with init_empty_weights(include_buffers=False):
        return _build(files, files.shapes)


def architecture_of(files: ComponentFiles) -> str:
    """Digest of all that the module of a component is built from."""
    component, shapes = files.component, files.shapes
    kind = component.construction.kind_of(shapes)
    fixed = {name: repr(value) for name, value in component.construction.fixed.items()}
    said = [component.name, kind.__module__, kind.__qualname__, fixed, files.config]
    return digest_of([*said, files.lacks, sorted(shapes.items())])


def build(component: Component, shapes: Shapes, config: Mapping[str, object] | None) -> nn.Module:
    """The module of a component, of diffusers or transformers, whose weights are not initialised: that
    takes most of the time, and they come from files.

    Args:
        shapes: of the tensors by the module's names.
        config: its config.json; where there is none the settings come from the shapes.

    Raises:
        KeyError, TypeError, ValueError: the settings or shapes make no such module.
    """
    construction = component.construction
    kind: Any = construction.kind_of(shapes)
    settings = construction.settings(shapes) if config is None else dict(config)
    settings |= construction.fixed
    with no_init_weights():
        if issubclass(kind, PreTrainedModel):
            make: Any = kind.config_class
            return kind(make(**settings) if config is None else make.from_dict(settings))
        if config is None:
            return kind(**settings)
        # Names with an underscore are diffusers' notes about the file, not settings.
        return kind.from_config({k: v for k, v in settings.items() if not k.startswith("_")})


def _build(files: ComponentFiles, shapes: Shapes) -> nn.Module:
    """The module of a component, without what its files leave out. Raises `WeightsError`."""
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
    """Compare names and shapes of the files with the module, from headers alone. Raises
    `WeightsError`."""
    expected = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    tied = getattr(module, "all_tied_weights_keys", None) or {}
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
    """Build a component and give it its weights, frozen and in evaluation mode.

    Args:
        device: where the weights lie.
        dtype: of floating-point parameters; modules that the architecture keeps in float32 stay.
        mapped: whether weights on the CPU may stay where they are mapped from the file, whose later
            changes would be theirs: for a caller that moves them on at once.

    Raises:
        WeightsError: see `build_empty` and `read_tensors`.
    """
    module = build_empty(files)
    keep: Sequence[str] = getattr(module, "_keep_in_fp32_modules", None) or ()
    state = files.component.construction.convert(read_tensors(files.files, files.start))
    for name, tensor in state.items():
        kept = any(part in keep for part in name.split("."))
        wanted = torch.float32 if kept else dtype
        wanted = wanted if tensor.is_floating_point() else tensor.dtype
        state[name] = tensor.to(device, wanted, copy=not mapped)
    _assign(module, state)
    return module.to(device).eval().requires_grad_(False)


def _assign(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    module.load_state_dict(state, strict=False, assign=True)
    tie = getattr(module, "tie_weights", None)
    if callable(tie):
        tie()
    left = [name for name, p in module.named_parameters() if p.is_meta]
    assert not left, f"parameters without weights: {left[:3]}"
