"""Whoever waits says for what, and a signal is heard at once, wherever nothing is in the making."""

import contextlib
import io
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import psutil
import pytest
from conftest import Values, train
from media_support import real_clip

from diffsynth_dagster.cache.store import Store
from diffsynth_dagster.config.recipe import read_values
from diffsynth_dagster.data.media.decoder_pool import DecoderPool
from diffsynth_dagster.data.media.video import video_facts
from diffsynth_dagster.errors import OutputError, ParameterError
from diffsynth_dagster.facts import FactCache
from diffsynth_dagster.run.signals import StopSignal, finishing


def when(ready: Callable[[], object], do: Callable[[], object]) -> Thread:
    """Do something in a thread as soon as something is so."""

    def watch() -> None:
        until = time.monotonic() + 60
        while not ready() and time.monotonic() < until:
            time.sleep(0.01)
        do()

    thread = Thread(target=watch)
    thread.start()
    return thread


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_acts_at_once_but_where_it_is_asked_for() -> None:
    with StopSignal() as asked:
        with finishing():
            signal.raise_signal(signal.SIGINT)
            assert asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_a_signal_ends_the_check_of_a_clip_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "decord.py").write_text(
        "import ctypes\ncpu = lambda i: None\n"
        "def VideoReader(path, **more): ctypes.CDLL(None).sleep(1000)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    before = {child.pid for child in psutil.Process().children()}

    def decoders() -> list[psutil.Process]:
        return [child for child in psutil.Process().children() if child.pid not in before]

    facts = FactCache(tmp_path / "facts.sqlite")
    began = 0.0

    def stop() -> None:
        nonlocal began
        began = time.monotonic()
        terminate()

    with StopSignal():
        sender = when(decoders, stop)
        with pytest.raises(KeyboardInterrupt), DecoderPool(1) as pool:
            facts.look_up("video", [real_clip()], lambda path: video_facts(path, pool))
        assert time.monotonic() - began < 30
    sender.join()
    _, left = psutil.wait_procs(decoders(), timeout=10)
    assert left == []
    facts.close()


def test_a_training_waits_for_a_clean_up_and_hears_a_signal(values: Values, tmp_path: Path) -> None:
    store, said = tmp_path / "store", io.StringIO()
    line = f"waiting for the clean-up of the store {store} by process {os.getpid()} on "
    with Store(store).in_use(alone=True), contextlib.redirect_stderr(said):
        sender = when(lambda: line in said.getvalue(), terminate)
        code, _ = train(values(cache_path=str(store)), tmp_path / "run")
    sender.join()
    assert code == 130
    assert said.getvalue().count(line) == 1
    assert said.getvalue().endswith(
        "stopped; with the same command the training has no state yet, and begins with its first step\n"
    )
    assert "Traceback" not in said.getvalue()


def test_a_store_is_used_as_soon_as_its_clean_up_ends(tmp_path: Path) -> None:
    store, said = Store(tmp_path), list[str]()
    clean_up = contextlib.ExitStack()
    clean_up.enter_context(store.in_use(alone=True))
    ending = when(lambda: said, clean_up.close)
    with store.in_use(waiting=said.append):
        assert len(said) == 1
    ending.join()


def test_who_holds_the_cache_of_facts_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffsynth_dagster.facts._LOOK_EVERY_S", 0.05)
    path, file = tmp_path / "facts.sqlite", tmp_path / "file"
    file.write_text("content")
    facts = FactCache(path)
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    ending = when(lambda: time.monotonic() > began + 0.3, lambda: other.execute("COMMIT"))
    with pytest.warns(UserWarning, match="waiting for .*facts.sqlite: database is locked"):
        digest = facts.digest(file)
    ending.join()
    other.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr("diffsynth_dagster.facts._PATIENCE_S", 0.2)
    file.write_text("other content")
    with (
        pytest.warns(UserWarning, match="waiting for"),
        pytest.raises(OutputError, match="another process holds the cache") as raised,
    ):
        facts.digest(file)
    assert "that can be written" not in str(raised.value)
    other.execute("COMMIT")
    assert facts.digest(file) != digest
    other.close()
    facts.close()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_not_waited_for(kind: str, tmp_path: Path) -> None:
    for name in ("lock", "recipe.yaml"):
        os.mkfifo(tmp_path / name) if kind == "pipe" else (tmp_path / name).mkdir()
    with pytest.raises(ParameterError, match="cannot be read: it is not a regular file"):
        read_values(tmp_path / "recipe.yaml")
    with pytest.raises(OutputError, match="cannot be written"), Store(tmp_path).in_use():
        pass
