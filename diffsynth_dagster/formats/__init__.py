"""LoRA files as different tools name their tensors: one module per format, each with `write`,
`read` and `try_load`."""

from importlib import import_module
from typing import get_args

from diffsynth_dagster.families.lora import LoraFormat
from diffsynth_dagster.formats.contract import Format, NamedTensors

FORMATS: tuple[LoraFormat, ...] = get_args(LoraFormat)


def find_format(name: LoraFormat) -> Format:
    """The format with this name."""
    # Imported on demand: some formats import peft, which is slow.
    return import_module(f"diffsynth_dagster.formats.{name}").FORMAT


__all__ = ["FORMATS", "Format", "LoraFormat", "NamedTensors", "find_format"]
