"""Events reach every listener, and Dagster's process as they were reported."""

import json
import math

import pytest

from diffsynth_dagster.run.events import (
    Encoded,
    Encoding,
    Event,
    Finished,
    HeldOutMetrics,
    Sampled,
    Saved,
    Started,
    StepMetrics,
    Warned,
    event_of,
    message_of,
)
from diffsynth_dagster.run.failure import Failure
from diffsynth_dagster.run.reporting import Reporter, Reporters

EVENTS = [
    Warned("little space"),
    Encoding("prompt", 2, 6),
    Encoded({"prompt": 2}, {"prompt": 4}),
    Started(10, 3),
    Sampled(4, "samples/step-4.png"),
    Saved(4, "step-4.safetensors"),
    Finished(10, {"after/accuracy": 0.5}),
    StepMetrics(4, 0, 0.5, 1e-3, math.inf, 0.1, 4, learning_rates={"unet": 1e-3}),
    HeldOutMetrics(4, 0.25, 0.125, [0.5, 0.0], 2),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_arrives_as_it_was_sent(event: Event) -> None:
    assert event_of(json.loads(json.dumps(message_of(event)))) == event


def test_every_kind_that_is_reported_can_be_sent() -> None:
    """But failures, which any process may have: see `run.failure`."""
    assert {type(event) for event in EVENTS} == {*Event.__subclasses__()} - {Failure}


def test_several_reporters_hear_every_event() -> None:
    heard: list[Event] = []

    class Listener(Reporter):
        def report(self, event: Event) -> None:
            heard.append(event)

    events = [*EVENTS, Failure("crash", "it broke")]
    both = Reporters([Listener(), Listener()])
    for event in events:
        both.report(event)
    assert heard == [event for event in events for _ in range(2)]
