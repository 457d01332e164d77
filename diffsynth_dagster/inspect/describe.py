"""Describe a weight file in lines for a person."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from diffsynth_dagster.config.models import adapter_text
from diffsynth_dagster.errors import printable
from diffsynth_dagster.inspect.subject import Subject
from diffsynth_dagster.run.record import RunRecord

# Characters of the column with the titles.
_WIDTH = 14
_SPEC = "modelspec."
# The fields of ModelSpec that are shown. The others repeat what the other lines say.
_SHOWN = ("title", "architecture", "implementation", "resolution", "trigger_phrase", "date")


def told(subject: Subject) -> list[str]:
    """Describe a weight file: family, training, base weights and content. Returns lines.

    Raises:
        WeightsError: the file is damaged.
    """
    lines = [str(subject.path.absolute())]
    lines += _provenance(subject) if subject.said else _foreign(subject)
    types = Counter(info.dtype for info in subject.header.values())
    counted = ", ".join(f"{count} {kind}" for kind, count in types.most_common())
    lines += line(
        "content", f"{len(subject.header)} tensors ({counted}), {subject.path.stat().st_size} bytes"
    )
    for name in _SHOWN:
        if _SPEC + name in subject.notes:
            lines += line(f"  {name}", subject.notes[_SPEC + name])
    return lines


def line(name: str, text: str) -> list[str]:
    """A line with a title and a text, with control characters escaped."""
    return [f"  {name:<{_WIDTH}} {printable(text)}".rstrip()]


def _provenance(subject: Subject) -> list[str]:
    """Lines about a file of this trainer, from its header and its run folder."""
    said, run = subject.said, subject.run
    lines = line("family", said["family"]) + line("trained", _trained(said, run and run.record))
    lines += line("step", _step(subject))
    lines += line("base weights", "")
    lines += [f"    {printable(name):<20} {printable(str(d))}" for name, d in said["base"].items()]
    lines += line("rows", f"{said['samples']} samples, {said['samples_digest']}")
    lines += line("training", said["identity"]) + line(
        "made by", f"diffsynth-dagster {said['version']}"
    )
    if run is None:
        return lines + line("run folder", "not found; give it with --run")
    lines += line("run folder", str(run.folder))
    libraries = ", ".join(f"{name} {v}" for name, v in run.record.libraries.items())
    if libraries:
        lines += line("libraries", libraries)
    if subject.is_as_written is False:
        lines += line("warning", "the file is not as the training wrote it: its bytes have changed")
    return lines


def _trained(said: Mapping[str, Any], record: RunRecord | None) -> str:
    """Which components were trained, and how."""
    # Headers of older versions do not say what was trained; the record does.
    names = said.get("trained", record.trained if record is not None else None)
    of = "" if names is None else f" of {', '.join(map(str, names))}"
    if not said.get("lora"):
        return f"all weights{of}"
    spelled = f", in the names of {said['format']}" if "format" in said else ""
    return f"{adapter_text(said['lora'])}{of}{spelled}"


def _step(subject: Subject) -> str:
    """The step of the file, and whether its training is finished."""
    step = "not known" if subject.step is None else str(subject.step)
    if subject.run is None:
        unfinished = subject.said.get("unfinished")
        return step if unfinished is None else f"{unfinished}; exported before it was finished"
    record = subject.run.record
    total = f" of {record.total_steps}" if record.total_steps else ""
    ended = "the training is finished" if record.finished else "the training is not finished"
    return f"{step}{total}; {ended}"


def _foreign(subject: Subject) -> list[str]:
    """Lines about a file without provenance."""
    from diffsynth_dagster.inspect.foreign import recognised

    lines = line("provenance", "none: no training of this project wrote the file")
    lines += [text for fact in recognised(subject.path, subject.header) for text in line(*fact)]
    return lines + line("first keys", ", ".join(first(sorted(subject.header), 3)))


def first(names: Iterable[str], count: int) -> list[str]:
    """The first `count` names, and a last entry that says how many more there are."""
    listed = list(names)
    more = len(listed) - count
    return listed[:count] + ([f"and {more} more"] if more > 0 else [])
