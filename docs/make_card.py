"""Takes the picture of the demo's model card, `card.png`, after `make demo`.

    .venv/bin/python docs/make_card.py

It shows the card as a page, rendered with markdown-it and Chromium (`apt-get install chromium`).
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
CARD = ROOT / "models" / "train" / "demo" / "exports" / "README.md"
STYLE = """
body { font: 15px/1.45 sans-serif; max-width: 800px; margin: 24px auto; color: #1f2328; }
pre { background: #f6f8fa; padding: 12px; max-height: 180px; overflow: hidden; }
code { font-size: 85%; overflow-wrap: anywhere; }
img { max-width: 100%; image-rendering: pixelated; }
"""


def main() -> None:
    """Render the card and take its picture."""
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("Chromium is missing: apt-get install chromium")
    if not CARD.is_file():
        sys.exit(f"{CARD.relative_to(ROOT)} is missing: make demo")
    text = re.sub(r"\A---\n.*?\n---\n", "", CARD.read_text(encoding="utf-8"), flags=re.DOTALL)
    page = MarkdownIt("commonmark").render(text)
    # Beside the card, so that its links to pictures lead somewhere.
    with tempfile.TemporaryDirectory(dir=CARD.parent) as folder:
        page = re.sub(r'src="(?!/)', 'src="../', page)
        html = Path(folder) / "card.html"
        html.write_text(f"<style>{STYLE}</style>{page}", encoding="utf-8")
        taken = Path(folder) / "card.png"
        command = [chromium, "--headless", "--no-sandbox", "--hide-scrollbars", "--disable-gpu"]
        command += ["--window-size=900,2350", f"--screenshot={taken}", html.as_uri()]
        subprocess.run(command, check=True, capture_output=True)
        shutil.copyfile(taken, ROOT / "docs" / "card.png")


if __name__ == "__main__":
    main()
