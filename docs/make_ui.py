"""Take the pictures of `ui.md`: the pages that `tests/test_dagster_browser.py` goes through.

python docs/make_ui.py

It needs Chromium (`apt-get install chromium chromium-driver`).
"""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from browser import INSTALL, Browser

ROOT = Path(__file__).resolve().parents[1]
TEST = "tests/test_dagster_browser.py"


def main() -> int:
    if not Browser.is_installed():
        sys.exit(f"Chromium is not installed: {INSTALL}")
    pictures = ROOT / "docs" / "ui"
    pictures.mkdir(exist_ok=True)
    env = {**os.environ, "BROWSER_PICTURES": str(pictures)}
    with TemporaryDirectory(prefix="pictures-") as folder:
        # The pages show paths in it.
        every = ["-n", "0", "-m", "soak", f"--basetemp={folder}/training", TEST]
        return subprocess.call([sys.executable, "-m", "pytest", *every], cwd=ROOT, env=env)


if __name__ == "__main__":
    sys.exit(main())
