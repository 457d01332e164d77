"""What a training process tells its launcher, by whatever way it comes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
from dagster_support import wait_for

from diffsynth_dagster.run.events import Saved, Warned, message_of
from resources.messages import FileMessages, MessageReader, told


class OtherReader(dg.PipesMessageReader):
    """Messages that come in another way than through a file."""

    @contextmanager
    def read_messages(self, handler: Any) -> Iterator[dict[str, str]]:
        event = message_of(Saved(step=1, path="a"))
        handler.handle_message({"method": "report_custom_message", "params": {"payload": event}})
        warning = {"payload": message_of(Warned("hot"))}
        handler.handle_message({"method": "report_custom_message", "params": warning})
        handler.handle_message({"method": "log", "params": {}})
        yield {"where": "elsewhere"}

    def no_messages_debug_text(self) -> str:
        return "elsewhere"


def test_messages_may_come_any_way() -> None:
    """From a job on a cluster, for example."""
    reader, rest, warned = MessageReader(OtherReader()), list[str](), list[str]()
    handler: Any = SimpleNamespace(handle_message=lambda message: rest.append(message["method"]))
    context: Any = SimpleNamespace(log=SimpleNamespace(warning=warned.append))
    with reader.read_messages(handler) as parameters:
        assert parameters == {"where": "elsewhere"}
        assert list(told(context, reader)) == [Saved(step=1, path="a")]
    assert list(told(context, reader)) == []
    assert (rest, warned) == (["log"], ["hot"])
    assert reader.no_messages_debug_text() == "elsewhere"


def test_a_message_that_is_still_being_written_is_waited_for(tmp_path: Path) -> None:
    reader, got = FileMessages(tmp_path / "messages"), list[Any]()
    handler: Any = SimpleNamespace(handle_message=got.append)
    with (
        reader.read_messages(handler) as parameters,
        open(parameters["path"], "a", encoding="utf-8", buffering=1) as file,
    ):
        file.write('{"method": "a"}\n{"meth')
        file.flush()
        wait_for(lambda: got, 10, "the first message")
        time.sleep(0.2)
        file.write('od": "ü"}\n')
        wait_for(lambda: len(got) == 2, 10, "the second one")
        file.write('{"method": "last"}\n')
    assert got == [{"method": "a"}, {"method": "ü"}, {"method": "last"}]
