"""The supervisor: nothing outlives whoever asked for it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from dagster_support import processes_about, wait_for

from resources.launcher import SUPERVISOR

STUBBORN = """
import signal, subprocess, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
print("ready", file=sys.stderr, flush=True)
time.sleep(600)
"""
POLITE = """
import signal, sys, time
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
open(sys.argv[1] + ".ready", "w").close()
while not asked:
    time.sleep(0.05)
time.sleep(0.5)
assert len(asked) == 1
open(sys.argv[1] + ".state", "w").close()
sys.exit(130)
"""
LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], start_new_session=True).wait())
"""
CRASHING_LAUNCHER = """
import os, signal, subprocess, sys
subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], start_new_session=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


class Supervised:
    """A command under the supervisor, with this process as the one who asks."""

    def __init__(self, tmp_path: Path, *command: str, grace: float = 1.0) -> None:
        self.tail = tmp_path / "tail"
        read, self.hold = os.pipe()
        options = ["--watch", str(read), "--tail", str(self.tail), "--grace", str(grace)]
        self.process = subprocess.Popen(
            [sys.executable, str(SUPERVISOR), *options, "--", sys.executable, "-c", *command],
            pass_fds=[read],
            stderr=subprocess.DEVNULL,
        )
        os.close(read)

    def let_go(self) -> None:
        os.close(self.hold)


@pytest.mark.parametrize(("code", "expected"), [("0", 0), ("2", 2), ("1", 1)])
def test_exit_code_and_last_words_come_through(tmp_path: Path, code: str, expected: int) -> None:
    program = f"import sys; print('last words', file=sys.stderr); sys.exit({code})"
    supervised = Supervised(tmp_path, program)
    assert supervised.process.wait(20) == expected
    assert supervised.tail.read_text() == "last words\n"
    supervised.let_go()


def test_death_by_signal_is_told(tmp_path: Path) -> None:
    supervised = Supervised(tmp_path, "import os; os.kill(os.getpid(), 9)")
    assert supervised.process.wait(20) == 128 + signal.SIGKILL
    supervised.let_go()


def test_tail_keeps_the_end(tmp_path: Path) -> None:
    program = "import sys; sys.stderr.write('x' * 200000 + 'end')"
    supervised = Supervised(tmp_path, program)
    assert supervised.process.wait(20) == 0
    text = supervised.tail.read_text()
    assert len(text) == 32 * 1024
    assert text.endswith("xend")
    supervised.let_go()


def test_worker_is_asked_once_and_may_finish(tmp_path: Path) -> None:
    """The launcher between is left alone, so that the worker has the time to write its state."""
    mark = str(tmp_path / "polite")
    supervised = Supervised(tmp_path, LAUNCHER, POLITE, mark, grace=10)
    wait_for(Path(f"{mark}.ready").exists, 20, "the worker is up")
    began = time.monotonic()
    supervised.let_go()
    assert supervised.process.wait(20) == 130
    assert Path(f"{mark}.state").exists()
    assert time.monotonic() - began < 8
    assert not processes_about(mark)


@pytest.mark.parametrize("how", ["let go", "SIGTERM", "SIGINT"])
def test_stubborn_worker_is_killed(tmp_path: Path, how: str) -> None:
    mark = str(tmp_path / "stubborn")
    supervised = Supervised(tmp_path, LAUNCHER, STUBBORN, mark)
    wait_for(lambda: len(processes_about(mark)) >= 3, 20, "the worker is up")
    if how == "let go":
        supervised.let_go()
    else:
        supervised.process.send_signal(signal.Signals[how])
    assert supervised.process.wait(20) == 130
    assert not processes_about(mark)


def test_orphan_of_a_crashed_launcher_is_stopped(tmp_path: Path) -> None:
    mark = str(tmp_path / "orphan")
    supervised = Supervised(tmp_path, CRASHING_LAUNCHER, STUBBORN, mark)
    assert supervised.process.wait(30) == 128 + signal.SIGKILL
    assert not processes_about(mark)
    supervised.let_go()


def test_kill_of_the_asker_is_enough(tmp_path: Path) -> None:
    """The asker is killed without a chance to act: the pipe closes all the same."""
    mark = str(tmp_path / "asker")
    program = f"""
import os, subprocess, sys, time
read, hold = os.pipe()
subprocess.Popen([sys.executable, {str(SUPERVISOR)!r}, "--watch", str(read), "--tail",
    {str(tmp_path / "gone" / "tail")!r}, "--grace", "1", "--", sys.executable, "-c",
    {STUBBORN!r}, {mark!r}], pass_fds=[read], stderr=subprocess.DEVNULL)
time.sleep(600)
"""
    asker = subprocess.Popen([sys.executable, "-c", program])
    wait_for(lambda: len(processes_about(mark)) >= 3, 20, "the worker is up")
    psutil.Process(asker.pid).kill()
    asker.wait()
    wait_for(lambda: not processes_about(mark), 20, "nothing is left")
