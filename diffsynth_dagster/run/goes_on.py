"""Where a run that was stopped goes on when it is started again, for the messages that say so.

Nothing heavy is imported here: what says it may have imported nothing yet.
"""

import re
from pathlib import Path

from diffsynth_dagster.config.parameters import TrainingConfig

FOLDER = "state"
_NAME = re.compile(r"step-(\d+)")


def state_folders(run_folder: Path) -> list[tuple[int, Path]]:
    """Step and folder of each state that is there, the newest first."""
    named = ((_NAME.fullmatch(p.name), p) for p in (run_folder / FOLDER).glob("step-*"))
    found = [(int(match[1]), path) for match, path in named if match is not None]
    return sorted(found, reverse=True)


def newest_step(run_folder: Path) -> int | None:
    """The step of the newest state in a run folder; None where there is none."""
    return next((step for step, _ in state_folders(run_folder)), None)


def say_where_it_goes_on(config: TrainingConfig) -> str:
    """Where a run goes on, when it is started again after its processes have ended."""
    if config.encodes_only:
        return "the encoding goes on with what the store lacks"
    step = newest_step(Path(config.output_path))
    if step is None:
        return "the training has no state yet, and begins with its first step"
    unless = ", unless it is to begin anew (resume: never)" if config.resume == "never" else ""
    return f"the training goes on after step {step}{unless}"
