"""Pictures that Dagster's webserver gives to the browser, from the folder of the runs' logs.

A page shows a value of metadata behind a click if it has more than 1000 characters, as every picture
inside it has. An address is short. And the description of an asset is made when definitions are
loaded: with an address in it, it shows what has been trained since.
"""

import os
import time
from pathlib import Path

import dagster as dg

from assets.common import short_digest
from diffsynth_dagster.config import Recipe

FOLDER = "diffsynth_pictures"
"""Beside the folders of the runs, which are named after them."""
PATH_PREFIX = "DAGSTER_WEBSERVER_PATH_PREFIX"
"""The variable from which `dagster-webserver` reads its option `--path-prefix`."""
NEWEST = "newest"
_KEPT = 50
"""How many pictures of one recipe are kept, beside the newest."""
_AHEAD_S = 10 * 365 * 24 * 3600.0


def address(recipe: Recipe, name: str) -> str:
    """Where the browser finds a picture of a recipe; nothing need be there yet."""
    place = "/".join(_place(recipe, name))
    return f"{os.environ.get(PATH_PREFIX, '').rstrip('/')}/logs/{place}/svg"


def shown(recipe: Recipe, name: str) -> str:
    """The picture of this name as Markdown."""
    # Without a text of its own: a browser shows nothing where the picture is not there.
    return f"![]({address(recipe, name)})"


def serve(context: dg.AssetExecutionContext, recipe: Recipe, name: str, svg: str) -> bool:
    """Put a picture of a recipe where the webserver finds it, instead of an earlier one of that name.

    Returns:
        Whether it can be found: not where logs are kept elsewhere than in a folder, or where that
        cannot be written. (No reason to fail a training.)
    """
    from dagster._core.storage.local_compute_log_manager import LocalComputeLogManager

    from diffsynth_dagster.errors import OutputError
    from diffsynth_dagster.files import write_text

    logs = context.instance.compute_log_manager
    if not isinstance(logs, LocalComputeLogManager):
        return False
    path = Path(logs.get_captured_local_path(_place(recipe, name), "svg"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, svg)
        # A browser takes a file for unchanged for a tenth of its age; this one it asks for each time.
        ahead = time.time() + _AHEAD_S
        os.utime(path, (ahead, ahead))
        others = sorted(path.parent.glob("*.svg"), key=lambda each: each.stat().st_mtime)
        for old in others[: -_KEPT - 1]:
            old.unlink()
    except (OutputError, OSError) as error:
        context.log.warning(f"the page does not show the newest pictures: {error}")
        return False
    return True


def _place(recipe: Recipe, name: str) -> list[str]:
    # Several projects may have a recipe of this name in one Dagster; their run folders differ.
    folder = short_digest(os.path.abspath(recipe.config.output_path))
    return [FOLDER, f"{recipe.name}-{folder}", name]
