"""Dagster's daemon for a soak: it looks more often, and a night begins when a file says so.

    SOAK_NIGHT=FILE python soak_daemon.py run -w workspace.yaml

The times of crons stay, beside those of the file: its text is the time in seconds since 1970.
"""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dagster._core.asset_graph_view.asset_graph_view import AssetGraphView
from dagster._daemon import asset_daemon, controller
from dagster._daemon.cli import main

NIGHT = "SOAK_NIGHT"
_before = AssetGraphView.compute_previous_cron_tick


def _last_night(self: AssetGraphView, **cron: Any) -> datetime:
    tick = _before(self, **cron)
    asked = datetime.fromtimestamp(float(Path(os.environ[NIGHT]).read_text()), UTC)
    return max(tick, asked) if asked <= self.effective_dt else tick


if __name__ == "__main__":
    AssetGraphView.compute_previous_cron_tick = _last_night
    asset_daemon.MIN_INTERVAL_LOOP_SECONDS = 2
    controller.RELOAD_WORKSPACE_INTERVAL = 6
    controller.THREAD_CHECK_INTERVAL = 2
    main()
