"""The steps of a pipeline, each in a process that the soak may kill.

The processes are forked from a server that has imported the large libraries, so that they start in
a second instead of ten. (Not Polars: it starts threads, which a forked process would lack.) A step
does what the asset of its name does, without Dagster. A failure prints one message and gives the
trainer's exit code.
"""

import csv
import gc
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from conftest import record_of

HEAVY = [
    *("accelerate", "av", "blake3", "dagster_pipes", "decord", "diffusers", "numpy", "peft"),
    *("PIL.Image", "pydantic", "safetensors.torch", "torch", "transformers", "yaml"),
    "diffusers.models.transformers.transformer_qwenimage",
    "diffusers.models.autoencoders.autoencoder_kl_qwenimage",
    "diffusers.pipelines.flux.pipeline_flux",
    "diffusers.pipelines.qwenimage.pipeline_qwenimage",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen2.tokenization_qwen2",
]
SHARD_BYTES = 20_000
"""Size of a shard in the soak's stores: so small that a few pictures need several shards."""
MEASURED = (
    *("seconds", "samples_per_second", "peak_memory_bytes", "beside", "digest", "resumed_from"),
)
"""Fields of the record that differ between two runs of the same training."""
CHECKPOINTS_ONLY = "--checkpoints_only"
"""The flag that the launcher gives the trainer, because exports are a step of their own."""
LONGEST_S = 600.0
"""A step that takes longer is regarded as hanging."""


def check_table(config: Any) -> int:
    from diffsynth_dagster.cache.split import with_settled
    from diffsynth_dagster.data.prepare import prepare_data
    from diffsynth_dagster.facts import fact_cache_of
    from diffsynth_dagster.weights.identify import guess_model

    # As the metadata asset: the family is guessed, since models may not be downloaded yet.
    config = with_settled(config)
    with fact_cache_of(config.cache_path) as facts:
        prepare_data(config, guess_model(config).family.columns, facts)
    return 0


def encode(config: Any) -> int:
    from diffsynth_dagster.cache.split import first_half

    return launch(first_half(config), CHECKPOINTS_ONLY)


def train(config: Any) -> int:
    from diffsynth_dagster.cache.split import second_half
    from diffsynth_dagster.run.up_to_date import (
        changed_exports,
        say_changed,
        why_train,
    )
    from diffsynth_dagster.weights.hub import ModelHub

    config = second_half(config)
    if why_train(config, ModelHub.from_environment(), None) is not None:
        return launch(config, CHECKPOINTS_ONLY)
    record = record_of(Path(config.output_path))
    changed = changed_exports(Path(config.output_path), record)
    if changed:
        print(f"warning: {say_changed(changed)}", file=sys.stderr)
    return 0


def export(config: Any) -> int:
    from diffsynth_dagster.export import export_folder
    from diffsynth_dagster.weights.hub import ModelHub

    for problem in export_folder(config, ModelHub.from_environment()).problems:
        raise problem
    return 0


def launch(config: Any, *flags: str) -> int:
    """Run the trainer's command line on a recipe that is written as the launcher writes it."""
    from diffsynth_dagster.config.recipe import dump_config
    from diffsynth_dagster.files import hidden_beside, write_text
    from diffsynth_dagster.train import main

    recipe = hidden_beside(Path(config.output_path) / "launch.yaml")
    write_text(recipe, dump_config(config))
    try:
        return main(["--recipe", str(recipe), *flags])
    finally:
        recipe.unlink(missing_ok=True)


STEPS: dict[str, Callable[[Any], int]] = {
    "table": check_table,
    "latents": encode,
    "checkpoints": train,
    "exports": export,
    "command": launch,
}
"""Name of a step → what it does with the config of a recipe."""


@dataclass(frozen=True)
class Death:
    """When and how an attempt is killed, if it has not ended before.

    Attributes:
        touch: kill it just before it touches files in `folder` for the n-th time.
        folder: a folder in the recipe's folder; "" for that folder itself.
        seconds: kill it after this time, if `touch` is None.
        by: the signal.
    """

    touch: int | None = None
    folder: str = ""
    seconds: float | None = None
    by: signal.Signals = signal.SIGKILL


NO_DEATH = Death()


def attempt(step: str, recipe: Path, death: Death, started: Connection) -> None:
    """Make one attempt at a step. This is the target of a process.

    Args:
        started: gets a message when everything is imported.
    """
    begin()
    log = os.open(recipe.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # results are compared byte by byte
    import diffsynth_dagster.training.loop  # noqa: F401
    from diffsynth_dagster.cache import shards
    from diffsynth_dagster.config.recipe import read_recipe
    from diffsynth_dagster.run.guard import FailureGuard, PrintedFailures

    shards.SHARD_BYTES = SHARD_BYTES
    started.send(None)
    # Only from here on: imports touch files, too, and take a varying time.
    touched = watch(str(recipe.parent / death.folder), death)
    with FailureGuard(PrintedFailures()) as guard:
        guard.code = STEPS[step](read_recipe(recipe).config)
    (recipe.parent / "touched").write_text(json.dumps(touched))
    sys.exit(guard.code)


def watch(folder: str, death: Death) -> list[int]:
    """Count how often Python touches files in a folder, and kill this process at `death.touch`.

    Returns:
        The count, which goes on, as the only element of a list.
    """
    count = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        touches = event.startswith(("open", "os.", "sqlite3.")) and arguments
        if touches and isinstance(arguments[0], (str, Path)):
            count[0] += str(arguments[0]).startswith(folder)
            if count[0] == death.touch:
                count[0] += 1  # once: a signal may be survived
                os.killpg(0, death.by)

    # Python reports every file operation to audit hooks before it is done.
    sys.addaudithook(hook)
    return count


@dataclass(frozen=True)
class Attempt:
    """How an attempt ended.

    Attributes:
        code: its exit code; None if SIGKILL ended it.
        said: what it printed.
        seconds: how long it took, if it was not killed.
        touched: how often it touched files, if it was not killed.
    """

    code: int | None
    said: str
    seconds: float = 0.0
    touched: int = 0


def start_server() -> Any:
    """The server from which attempts are forked, as a context of `multiprocessing`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    return context


def begin() -> None:
    """What every forked process does first."""
    os.setsid()  # a session of its own, so that its children can be killed with it
    gc.freeze()  # or each garbage collection would search all that the server has imported


def make_attempt(server: Any, step: str, recipe: Path, death: Death = NO_DEATH) -> Attempt:
    """Try a step of a recipe once, in a process of its own, and kill it as `death` says."""
    (recipe.parent / "touched").unlink(missing_ok=True)
    hears, says = server.Pipe(duplex=False)
    process = server.Process(target=attempt, args=(step, recipe, death, says))
    process.start()
    says.close()  # so that `recv` ends if the process dies before it sends
    with suppress(EOFError):
        hears.recv()
    began = time.monotonic()
    if death.seconds is not None and not wait([process.sentinel], death.seconds):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, death.by)
    # A signal other than SIGKILL may let it end in its own way.
    done = wait([process.sentinel], LONGEST_S)
    seconds = time.monotonic() - began
    if not done:
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    said = (recipe.parent / "log").read_text(encoding="utf-8", errors="replace")
    assert done, f"{step} hangs:\n{said}"
    if process.exitcode == -signal.SIGKILL:
        return Attempt(None, said)
    file = recipe.parent / "touched"
    touched = json.loads(file.read_text())[0] if file.exists() else 0
    return Attempt(process.exitcode, said, seconds, touched)


def result(run: Path) -> dict[str, Any]:
    """What a finished run leaves for its user, without measurements: name → content."""
    patterns = (
        "*.safetensors",
        "samples/*",
        "exports/*/*",
        "rows.parquet",
        "held_out.csv",
    )
    files = [path for pattern in patterns for path in run.glob(pattern)]
    # Byte by byte, but for the two files that hold times and speeds.
    found: dict[str, Any] = {str(p.relative_to(run)): p.read_bytes() for p in files}
    for name, read in (("run.json", _facts), ("metrics.csv", _steps)):
        if (run / name).is_file():
            found[name] = read(run / name)
    return found


def _facts(path: Path) -> Any:
    """The record of a run without measurements; the bytes of a damaged one."""
    content = path.read_bytes()
    try:
        return {k: v for k, v in json.loads(content).items() if k not in MEASURED}
    except ValueError:
        return content


def _steps(path: Path) -> Any:
    """The rows of a metrics.csv without measurements."""
    from diffsynth_dagster.run.events import MEASURED as OF_STEPS

    # The file may be damaged: it must compare as unequal, not fail to parse.
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = csv.DictReader(text.replace("\0", "?").splitlines())
    return [{k: v for k, v in row.items() if k not in OF_STEPS} for row in rows]
