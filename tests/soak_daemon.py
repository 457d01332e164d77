"""Dagster's daemon for a soak: with shorter intervals, and with a cron tick when a file says so.

    SOAK_NIGHT=FILE python soak_daemon.py run -w workspace.yaml

The text of the file is a time in seconds since 1970. At this time every cron condition has a tick,
in addition to its own.
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
    """In the place of `compute_previous_cron_tick`: the later one of its tick and the file's."""
    tick = _before(self, **cron)
    asked = datetime.fromtimestamp(float(Path(os.environ[NIGHT]).read_text()), UTC)
    return max(tick, asked) if asked <= self.effective_dt else tick


if __name__ == "__main__":
    # Dagster has no settings for these intervals; its own are 5, 60 and 5 seconds.
    AssetGraphView.compute_previous_cron_tick = _last_night
    asset_daemon.MIN_INTERVAL_LOOP_SECONDS = 2
    controller.RELOAD_WORKSPACE_INTERVAL = 6
    controller.THREAD_CHECK_INTERVAL = 2
    main()
