"""Where a stopped run goes on when it is started again: a sentence for messages.

Nothing heavy is imported here: a process may be stopped before it has imported anything else.
"""

import json
import re
from pathlib import Path

from diffsynth_dagster.config.parameters import TrainingConfig

FOLDER = "state"
_NAME = re.compile(r"step-(\d+)")


def state_folders(run_folder: Path) -> list[tuple[int, Path]]:
    """Step and folder of each state in a run folder, newest first."""
    # The pattern skips hidden and renamed folders, which are unfinished or somebody's own.
    named = ((_NAME.fullmatch(p.name), p) for p in (run_folder / FOLDER).glob("step-*"))
    states = [(int(match[1]), path) for match, path in named if match is not None]
    return sorted(states, reverse=True)


def newest_step(run_folder: Path) -> int | None:
    """The step of the newest state in a run folder; None if there is none."""
    return next((step for step, _ in state_folders(run_folder)), None)


def resume_sentence(config: TrainingConfig) -> str:
    """A sentence that says where a run goes on when it is started again."""
    if config.encodes_only:
        return "the encoding goes on with what the store lacks"
    folder = Path(config.output_path)
    step = newest_step(folder)
    if step is None:
        return "the training has no state yet, and begins with its first step"
    if _is_finished(folder):
        # What is there may be another training, which then moves to older/.
        return (
            f"the training goes on after step {step} if it is the finished one that is there, or a "
            "longer one, and else begins with its first step"
        )
    unless = ", unless it is to begin anew (resume: never)" if config.resume == "never" else ""
    return f"the training goes on after step {step}{unless}"


def _is_finished(run_folder: Path) -> bool:
    """Whether the record in a run folder is of a finished training; False if it cannot be read."""
    try:
        record = json.loads((run_folder / "run.json").read_text(encoding="utf-8"))
        return bool(record["finished"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
