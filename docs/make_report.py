"""Take the pictures of `usage.md` of a report: that of the demo, which is trained for it.

python docs/make_report.py [RUN_FOLDER]

RUN_FOLDER is …/models/train/demo, where it is there already. It needs Chromium (`apt-get install chromium
chromium-driver`).
"""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from browser import INSTALL, Browser, browsing

ROOT = Path(__file__).resolve().parents[1]
HEIGHT = {"result": 1830, "rows": 1010}
"""The height of each picture in pixels."""
FLAGS = ("--host-resolver-rules=MAP * ~NOTFOUND", "--hide-scrollbars")
RUN = "models/train/demo"
LARGEST = 120 * 1024
TO_ROWS = """const heads = [...document.querySelectorAll("h2")];
scrollTo(0, heads.find((head) => head.innerText === "What to do with it").offsetTop - 16);"""


def main() -> int:
    if not Browser.is_installed():
        sys.exit(f"Chromium is not installed: {INSTALL}")
    with TemporaryDirectory(prefix="pictures-") as folder:
        given = sys.argv[1:]
        run = Path(given[0]) if given else trained(Path(folder))
        # Its commands have the path by which the folder was given: a relative one, as people do.
        command = [sys.executable, "-m", "diffsynth_dagster.report", RUN]
        at = run.absolute().parents[2]
        subprocess.run(command, cwd=at, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
        take(run.absolute() / "report.html")
    return 0


def trained(folder: Path) -> Path:
    """Train the demo; returns its run folder."""
    data = folder / "data"
    places = {
        "output_path": folder / RUN,
        "cache_path": folder / "cache",
        "dataset_base_path": data,
        "dataset_metadata_path": data / "metadata.csv",
        "validation_metadata_path": data / "held_out.csv",
    }
    recipe = ["--recipe", "recipes/demo.yaml"]
    flags = [f"--{name}={path}" for name, path in places.items()]
    trainer = [sys.executable, "-m", "diffsynth_dagster.train"]
    subprocess.run([*trainer, *recipe, *flags], cwd=ROOT, check=True)
    return folder / RUN


def take(report: Path) -> None:
    """Take the pictures of a report."""
    pictures = ROOT / "docs" / "report"
    pictures.mkdir(exist_ok=True)
    with browsing(FLAGS) as browser:
        browser.prefer("light")
        for name, height in HEIGHT.items():
            browser.resize(1280, height)
            browser.open(report.as_uri())
            if name == "rows":
                browser.run(TO_ROWS)
            path = pictures / f"{name}.png"
            browser.keep(path, exact=True)
            assert path.stat().st_size <= LARGEST, name


if __name__ == "__main__":
    sys.exit(main())
