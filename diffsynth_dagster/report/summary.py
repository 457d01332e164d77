"""The head of the report: whether the training worked, in sentences and a few numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from diffsynth_dagster.report.charts import Chart, Line
from diffsynth_dagster.report.metrics import Metrics
from diffsynth_dagster.report.words import amount, change, duration, loss, memory, percent, whole
from diffsynth_dagster.run.events import HeldOutMetrics
from diffsynth_dagster.run.record import RunRecord

Tone = Literal["good", "bad", "plain"]
_RISEN = 0.01
"""A held-out loss this much above its smallest has risen: less may be the training's noise."""
_WIDER = 0.05
"""A gap that grew by less than this part of the loss may be the noise of few rows."""
_NOTICED = 0.005
"""A loss that moved less than this has not changed."""


@dataclass(frozen=True)
class Verdict:
    """One sentence on how the training went, and whether that is good."""

    tone: Tone
    text: str


@dataclass(frozen=True)
class Number:
    """A number in the head of the report.

    Attributes:
        note: what it is compared with, in small type.
    """

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Status:
    """How far a training is.

    Attributes:
        word: finished, stopped early, or not finished.
        text: the same with its steps.
    """

    word: str
    text: str
    tone: Tone


def measurements(record: RunRecord) -> list[HeldOutMetrics]:
    """The measurements of the held-out loss, in their order."""
    return [HeldOutMetrics(**values) for values in record.held_out]


def status_of(record: RunRecord, metrics: Metrics) -> Status:
    """How far a training is, by its record and its log."""
    total = record.total_steps or record.steps
    if not record.finished:
        text = f"step {whole(metrics.step)} of {whole(total)}"
        return Status("not finished", text, "plain")
    if record.steps < total:
        text = f"stopped early after step {whole(record.steps)} of {whole(total)}"
        return Status("finished", text, "good")
    return Status("finished", f"all {whole(record.steps)} steps", "good")


def verdicts(record: RunRecord, metrics: Metrics) -> list[Verdict]:
    """Whether the training worked, the most important first."""
    return [*_failures(record), *_held_out(record), *_loss(record, metrics)]


def _failures(record: RunRecord) -> Iterator[Verdict]:
    if not record.all_losses_finite:
        yield Verdict(
            "bad",
            "A loss or a gradient was not finite: the training broke. A lower learning rate, "
            "`max_grad_norm` or `mixed_precision: bf16` may help.",
        )
    if record.finished and record.trained_tensors and not record.changed_tensors:
        yield Verdict("bad", "No trained weight has changed: nothing was learned.")


def _held_out(record: RunRecord) -> Iterator[Verdict]:
    measured = measurements(record)
    later = [m for m in measured if m.step > 0]
    if not measured:
        yield Verdict(
            "plain",
            "No rows were held out, so no number says whether it learned or memorised. Judge by the "
            "samples, and give `validation_split: 0.1` next time.",
        )
        return
    if not later:
        yield Verdict("plain", f"Held-out loss before the first step: {loss(measured[0].loss)}.")
        return
    first, last = measured[0], measured[-1]
    best = min(later, key=lambda m: (m.loss != m.loss, m.loss))
    yield _fallen(first, best, "It learned" if record.finished else "It is learning")
    if last.loss > best.loss * (1 + _RISEN):
        kept = (
            "its weights are kept, and exports take them"
            if record.best
            else ("`keep_best: true` keeps those weights")
        )
        yield Verdict(
            "bad",
            f"Since step {whole(best.step)} the held-out loss has risen by "
            f"{percent(last.loss / best.loss - 1)}: the later steps memorise; {kept}.",
        )
    elif record.finished and _still_falls(later):
        yield Verdict("plain", "It was still falling at the end: more steps may make it better.")
    yield _gap(first, last)


def _still_falls(later: Sequence[HeldOutMetrics]) -> bool:
    """Whether the last measurement is noticeably below the one before it."""
    return len(later) > 1 and later[-1].loss < later[-2].loss * (1 - _NOTICED)


def _fallen(first: HeldOutMetrics, best: HeldOutMetrics, learned: str) -> Verdict:
    """How far the held-out loss fell, from its first measurement to its smallest."""
    numbers = f"from {loss(first.loss)} to {loss(best.loss)} at step {whole(best.step)}"
    if first.step == best.step:
        return Verdict("plain", f"Held-out loss {loss(best.loss)} at step {whole(best.step)}.")
    if best.loss < first.loss * (1 - _NOTICED):
        return Verdict(
            "good",
            f"{learned}: the loss of rows that it never saw fell {numbers} "
            f"({change(first.loss, best.loss)}).",
        )
    return Verdict(
        "bad",
        f"The loss of rows that it never saw did not fall ({numbers}): it learned nothing that "
        "holds for them. See the samples; the learning rate may be too low or too high.",
    )


def _gap(first: HeldOutMetrics, last: HeldOutMetrics) -> Verdict:
    """How much better the trained rows are known than the held-out ones."""
    gap, before = last.gap, first.gap
    text = f"Gap between held-out and trained rows: {loss(gap)}, at first {loss(before)}"
    if gap - before > _WIDER * abs(last.trained_loss):
        return Verdict("plain", f"{text}. It has grown, which is a sign of memorising.")
    return Verdict("plain", f"{text}. It has not grown: no sign of memorising.")


def _loss(record: RunRecord, metrics: Metrics) -> Iterator[Verdict]:
    """What the training loss says; less than the held-out loss, so it comes last."""
    first, last = metrics.mean_loss(0), metrics.mean_loss(-1)
    if record.held_out or first is None or last is None or metrics.step < 20:
        return
    moved = f"the first tenth of the steps had {loss(first)}, the last {loss(last)}"
    fell = last < first * (1 - _NOTICED)
    yield Verdict(
        "plain",
        f"Mean training loss: {moved} ({change(first, last)})."
        + ("" if fell else " It did not fall, which is usual for short trainings of large models."),
    )


def numbers(record: RunRecord, metrics: Metrics) -> list[Number]:
    """The numbers in the head of the report, rounded."""
    found = [Number("steps", *_steps(record, metrics))]
    measured = measurements(record)
    if measured:
        best = min(measured, key=lambda m: (m.step == 0, m.loss != m.loss, m.loss))
        last = measured[-1]
        found.append(Number("held-out loss", loss(last.loss), f"{loss(measured[0].loss)} at first"))
        if best.step and best.step != last.step:
            note = f"at step {whole(best.step)}"
            found.append(Number("best held-out loss", loss(best.loss), note))
        before = f"{loss(measured[0].gap)} at first"
        found.append(Number("gap to trained rows", loss(last.gap), before))
    mean, first = metrics.mean_loss(-1), metrics.mean_loss(0)
    if mean is not None and first is not None:
        note = f"mean of the last tenth; first {loss(first)}"
        found.append(Number("training loss", loss(mean), note))
    found += _speed(record, metrics)
    return found


def _steps(record: RunRecord, metrics: Metrics) -> tuple[str, str]:
    total = record.total_steps or record.steps
    if record.finished:
        return whole(record.steps), "" if record.steps >= total else f"of {whole(total)}"
    return whole(metrics.step), f"of {whole(total)}"


def _speed(record: RunRecord, metrics: Metrics) -> Iterator[Number]:
    """Time, speed and memory."""
    seconds = record.seconds or metrics.seconds
    if seconds:
        left = None if record.finished else metrics.seconds_left(record.total_steps)
        note = "" if left is None else f"about {duration(left)} left"
        yield Number("time", duration(seconds), note)
    speed = record.samples_per_second or metrics.samples_per_second
    if speed:
        yield Number("samples per second", f"{speed:.3g}" if speed < 100 else whole(speed))
    peaks = [value for _, value in metrics.column("peak_memory_bytes")]
    peak = record.peak_memory_bytes or max(peaks, default=0)
    if peak:
        devices = sorted(set(record.devices))
        yield Number("peak memory", memory(peak), ", ".join(devices))


def held_out_charts(record: RunRecord) -> list[Chart]:
    """The held-out loss beside that of trained rows, and by range of the schedule."""
    measured = measurements(record)
    if not measured:
        return []
    later = [m for m in measured if m.step > 0]
    best = min(later, key=lambda m: (m.loss != m.loss, m.loss), default=None)
    mark = None if best is None else (float(best.step), "best")
    losses = Chart(
        "Held-out loss",
        "The same noise each time, so it moves only with the weights. It should fall; where it rises "
        "again while that of trained rows falls, the training memorises.",
        "loss",
        [
            Line("held-out rows", [(m.step, m.loss) for m in measured]),
            Line("as many trained rows", [(m.step, m.trained_loss) for m in measured]),
        ],
        mark,
    )
    count = len(measured[0].ranges)
    if count < 2:
        return [losses]
    lines = [
        Line(name, [(m.step, m.ranges[k]) for m in measured if k < len(m.ranges)])
        for k, name in enumerate(range_names(count))
    ]
    by_range = Chart(
        "Held-out loss by timesteps",
        "Much noise decides composition, little noise details.",
        "loss",
        lines,
    )
    return [losses, by_range]


def range_names(count: int) -> list[str]:
    """The names of equal ranges of the schedule, the one with the most noise first."""
    bounds = [round(100 * k / count) for k in range(count + 1)]
    names = [f"{a}-{b} %".replace("-", "–") for a, b in pairwise(bounds)]
    if count > 1:
        names[0] += " (most noise)"
        names[-1] += " (least noise)"
    return names


@dataclass(frozen=True)
class Compared:
    """A number before and after.

    Attributes:
        best: the number at the best step; None if that is the last.
    """

    name: str
    before: str
    after: str
    change: str
    best: str | None = None


def ranges_compared(record: RunRecord) -> list[Compared]:
    """The held-out loss of each range, before and now; empty with fewer than two measurements."""
    measured = measurements(record)
    if len(measured) < 2 or len(measured[0].ranges) < 2:
        return []
    first, last = measured[0], measured[-1]
    names = range_names(len(first.ranges))
    rows = [*zip(names, first.ranges, last.ranges, strict=False), ("all", first.loss, last.loss)]
    return [Compared(name, loss(a), loss(b), change(a, b)) for name, a, b in rows]


def evaluation_compared(record: RunRecord) -> list[Compared]:
    """The metrics of `customized_evaluation` before and after."""
    names = [name.partition("/")[2] for name in record.evaluation]

    def of(when: str, name: str) -> str:
        value = record.evaluation.get(f"{when}/{name}")
        return "" if value is None else amount(value)

    return [
        Compared(name, of("before", name), of("after", name), "") for name in dict.fromkeys(names)
    ]


def tone_of(found: Sequence[Verdict]) -> Tone:
    """The tone of all sentences together: the worst, else the best."""
    tones = {verdict.tone for verdict in found}
    return "bad" if "bad" in tones else "good" if "good" in tones else "plain"
