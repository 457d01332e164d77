"""Compare two weight files: which tensors differ, and which differences of their trainings may
explain it."""

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import UserError, printable, shown
from diffsynth_dagster.fingerprint import Fingerprint
from diffsynth_dagster.inspect.describe import first
from diffsynth_dagster.inspect.subject import Run, Subject
from diffsynth_dagster.inspect.tables import differences, ranges, tables_of
from diffsynth_dagster.run.record import RunRecord

# At most so many differing rows are listed.
_SHOWN = 20


def compared(one: Subject, other: Subject) -> list[str]:
    """Compare two files. Returns lines: first about their tensors, then about their trainings.

    Raises:
        WeightsError: a file is damaged.
    """
    lines = [f"A: {one.path.absolute()}", f"B: {other.path.absolute()}", *_tensors(one, other)]
    for name, side in (("A", one), ("B", other)):
        if not side.said:
            lines.append(f"{name} has no provenance: nothing more can be compared")
        elif side.run is None:
            lines.append(f"the run folder of {name} is not found: its parameters are not known")
    if not one.said or not other.said:
        return lines
    causes = [
        *_pair("family", one.said["family"], other.said["family"]),
        *_pair("LoRA", one.said.get("lora"), other.said.get("lora")),
        *_pair("step", one.step, other.step),
        *_pairs(one.said["base"], other.said["base"], "base weights of "),
        *_rows(one, other),
        *_pair("version of diffsynth-dagster", one.said["version"], other.said["version"]),
    ]
    if one.run is not None and other.run is not None:
        causes += _records(one.run.record, other.run.record)
    elif one.said["config_digest"] != other.said["config_digest"]:
        causes.append("parameters: they differ, and it is not known which")
    lines += causes or ["no difference between the trainings is recorded"]
    lines += _losses(one.run, other.run)
    return [printable(line) for line in lines]


def _pair(name: str, before: object, now: object) -> list[str]:
    """A line where two values differ."""
    return _pairs({name: before}, {name: now})


def _pairs(before: Mapping[str, Any], now: Mapping[str, Any], what: str = "") -> list[str]:
    """A line for each name whose values differ; it begins with `what`."""
    names = sorted(Fingerprint(before).differs(Fingerprint(now)))
    return [f"{what}{n}: {shown(before.get(n))} and {shown(now.get(n))}" for n in names]


def _tensors(one: Subject, other: Subject) -> list[str]:
    """Compare the tensors of two files. Only one pair of tensors is in memory at a time."""
    if {one.path.suffix, other.path.suffix} != {".safetensors"}:
        return ["tensors: they are compared in .safetensors files alone"]
    alone = [sorted(a.header.keys() - b.header.keys()) for a, b in ((one, other), (other, one))]
    lines = [
        f"tensors of {name} alone: {', '.join(first(names, 3))}"
        for name, names in zip("AB", alone, strict=True)
        if names
    ]
    unequal: list[str] = []
    largest = 0.0
    with safe_open(one.path, "pt") as a, safe_open(other.path, "pt") as b:
        for name in sorted(one.header.keys() & other.header.keys()):
            if one.header[name] != other.header[name]:
                kinds = (
                    f"{h[name].dtype} {list(h[name].shape)}" for h in (one.header, other.header)
                )
                lines.append(f"tensor {name}: {' and '.join(kinds)}")
                continue
            x, y = a.get_tensor(name), b.get_tensor(name)
            # Compared as bytes: NaN equals NaN then, and 0.0 differs from -0.0.
            if not torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8)):
                unequal.append(name)
                largest = max(largest, float((x.double() - y.double()).abs().max()))
    if unequal:
        lines.append(
            f"tensors: {len(unequal)} of {len(one.header)} differ, by {largest:.3g} at most: "
            f"{', '.join(first(unequal, 3))}"
        )
    return lines or ["tensors: all are equal"]


def _rows(one: Subject, other: Subject) -> list[str]:
    """The rows of the data sets that differ, with their numbers."""
    if one.said["samples_digest"] == other.said["samples_digest"]:
        return []
    what = f"samples: {one.said['samples']} and {other.said['samples']}"
    if one.run is None or other.run is None:
        return [f"{what}; which differ is not known without both run folders"]
    try:
        sides = [tables_of(run).checked.accepted.collect() for run in (one.run, other.run)]
    except UserError as error:
        return [f"{what}; which differ is not known: {error.what} ({error.where})"]
    found = differences(*sides, digests=True)
    lines = [f"{what}, of which differ:"]
    lines += first([f"  row {a} of A, {b} of B: {why}" for a, b, why in found.changed], _SHOWN)
    lines += [f"  rows of A alone: {ranges(found.removed)}"] if found.removed else []
    lines += [f"  rows of B alone: {ranges(found.added)}"] if found.added else []
    if found:
        return lines
    # The digest also covers the order and the encoding of the samples.
    return [f"{what}: the same rows in another order, or encoded otherwise (sizes, weights)"]


def _records(one: RunRecord, other: RunRecord) -> list[str]:
    """The differences of two records: parameters, precision, devices and library versions."""
    lines: list[str] = []
    # Records of older versions have no parameters, only their digest.
    if bool(one.parameters) == bool(other.parameters):
        # What is off by default is not recorded where it is off.
        off = TrainingConfig.model_validate({}).model_dump(mode="json")
        lines += _pairs({**off, **one.parameters}, {**off, **other.parameters})
    elif one.config_digest != other.config_digest:
        lines.append("parameters: they differ, and a record of an older version does not name them")
    lines += _pair("held-out samples", one.held_out_digest, other.held_out_digest)
    lines += _pair("precision", one.mixed_precision, other.mixed_precision)
    lines += _pair("devices", ", ".join(one.devices), ", ".join(other.devices))
    if one.libraries and other.libraries:
        lines += _pairs(one.libraries, other.libraries, "version of ")
    elif one.libraries != other.libraries:
        lines.append("versions of the libraries: not recorded for one of the two")
    return lines


def _losses(one: Run | None, other: Run | None) -> list[str]:
    """The last losses of both trainings, if their run folders are known."""
    lines: list[str] = []
    for name, run in (("A", one), ("B", other)):
        if run is None:
            continue
        record = run.record
        held_out = record.held_out[-1] if record.held_out else None
        final = "not known" if record.final_loss is None else f"{record.final_loss:.6g}"
        more = (
            ""
            if held_out is None
            else f", held out {held_out['loss']:.6g} (step {held_out['step']})"
        )
        lines.append(f"loss of the training of {name}: {final} in its last step{more}")
    return lines
