"""Trainings and runs of a soak, forked from a server that has imported the large libraries.

    python soak_forks.py serve NAME              the server: forks on request at the sockets of NAME
    python soak_forks.py NAME -m module args …   a stand-in for `accelerate launch`

The supervisor starts the stand-in as it would start `accelerate launch`. The stand-in asks the
server to fork the training, passes signals on to it, and exits with its exit code; if the stand-in
is killed, the training ends. Runs are forked by a forkserver of `multiprocessing` (`fork_runs`).
"""

import gc
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

OURS = ("dagster", "dagster._grpc.server", "diffsynth_dagster.component")
"""Modules that runs import, besides the heavy ones."""
_MOST_BYTES = 1 << 20
"""Limit of a request."""


def _address(name: str) -> str:
    """An abstract socket of Linux: it has no file, and vanishes with the server."""
    return f"\0{name}"


def stand_for(name: str, arguments: Sequence[str]) -> int:
    """Let the server fork a training, and wait for it; returns its exit code."""
    # SEQPACKET keeps messages apart, and the server notices when this process dies.
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asked:
        asked.connect(_address(name))
        request = {"arguments": arguments, "env": dict(os.environ), "cwd": os.getcwd()}
        # With the open files 1 and 2, so that the training prints to where this process would.
        socket.send_fds(asked, [json.dumps(request).encode()], [1, 2])
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda got, _: asked.send(bytes([got])))
        answer = asked.recv(16)
    code = int(answer) if answer else 1  # no answer: the server was killed
    return code if code >= 0 else 1


def fork_runs(name: str) -> Any:
    """A context of `multiprocessing` whose processes are forked from the server."""
    import multiprocessing
    from multiprocessing import forkserver

    # Pretend that this process has started the server's forkserver, as its own is not needed.
    server: Any = forkserver._forkserver
    server._forkserver_address = _address(f"{name}.runs")
    server._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)  # children get it, and ignore it
    server.ensure_running = lambda: None
    return multiprocessing.get_context("forkserver")


def serve(name: str) -> None:
    """Run the server until it is killed."""
    from importlib import import_module

    from soak_support import HEAVY

    for module in (*HEAVY, *OURS):
        import_module(module)
    gc.freeze()
    # Nothing is written to the pipe. When this process dies, its end `held` closes: the child's
    # forkserver sees that and ends.
    ends_with_us, held = os.pipe()
    if os.fork() == 0:
        os.close(held)
        _serve_runs(name, ends_with_us)
    _serve_trainings(name)


def _serve_runs(name: str, alive: int) -> None:
    """Run a forkserver of `multiprocessing` until the pipe `alive` is closed."""
    from multiprocessing import forkserver

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(_address(f"{name}.runs"))
    listener.listen()
    forkserver.main(listener.fileno(), alive, [])


def _serve_trainings(name: str) -> None:
    """Fork a process for each request, which runs and watches one training."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(_address(name))
        listener.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system reaps them
        while True:
            asked, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _watch(asked)
                os._exit(0)
            asked.close()


def _watch(asked: socket.socket) -> None:
    """Run one training. Pass on signals from its stand-in, and kill it if the stand-in dies."""
    import multiprocessing
    from multiprocessing.connection import wait

    text, streams, _, _ = socket.recv_fds(asked, _MOST_BYTES, 2)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_train, args=(json.loads(text), streams, asked))
    process.start()
    assert process.pid is not None
    while True:
        if asked in wait([process.sentinel, asked]):
            number = asked.recv(1)  # empty: the stand-in has died
            if number:
                os.kill(process.pid, number[0])
                continue
            process.kill()
        process.join()
        if process.exitcode is not None:
            break
    try:
        asked.send(str(process.exitcode).encode())
    except OSError:
        return  # the stand-in was killed meanwhile


def _train(request: dict[str, Any], streams: Sequence[int], asked: socket.socket) -> None:
    """Run the trainer's command line in the stand-in's environment, folder and output files."""
    from soak_support import begin

    begin()
    asked.close()
    for own, given in zip((1, 2), streams, strict=True):
        os.dup2(given, own)
        os.close(given)
    os.environ.clear()
    os.environ.update(request["env"], ACCELERATE_MIXED_PRECISION="no", OMP_NUM_THREADS="1")
    os.chdir(request["cwd"])
    from diffsynth_dagster.train import main

    code = main(request["arguments"][2:])  # without `-m module`
    sys.stderr.flush()
    sys.exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(stand_for(sys.argv[1], sys.argv[2:]))
