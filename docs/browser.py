"""A real browser, Chromium without a window, for the pictures of the docs and for tests.

It is driven through chromedriver, with requests of the WebDriver protocol
(https://www.w3.org/TR/webdriver2/).
"""

import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import requests
from PIL import Image

INSTALL = "apt-get install chromium chromium-driver"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-prefers-reduced-motion",
)
WINDOW = (1280, 1000)
_COLOURS = 128
_SAID = 3000
_FIND = """
const [words, whole] = arguments;
const seen = (node) => node.getClientRects().length > 0;
const says = (node) => {
    const text = (node.innerText || node.placeholder || node.ariaLabel || "").trim();
    return whole ? text === words : text.includes(words);
};
// The innermost comes last among the elements that have the text.
return [...document.querySelectorAll("body *")].filter((x) => says(x) && seen(x)).at(-1) || null;
"""


class Browser:
    """Chromium without a window, through chromedriver.

    Args:
        folder: an empty one for its profile.
        flags: further flags of Chromium.
    """

    def __init__(self, folder: Path, flags: Sequence[str] = ()) -> None:
        port = free_port()
        self._driver = subprocess.Popen(
            [str(shutil.which("chromedriver")), f"--port={port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # What it writes beside its profile goes there too.
            env={**os.environ, "HOME": str(folder), "TMPDIR": str(folder)},
        )
        address = f"http://127.0.0.1:{port}/session"
        wait_for(lambda: listens(port), 20, "chromedriver listens")
        size = f"--window-size={WINDOW[0]},{WINDOW[1]}"
        options = {
            "binary": shutil.which("chromium"),
            "args": [*FLAGS, *flags, size, f"--user-data-dir={folder / 'profile'}"],
        }
        logged = {"performance": "ALL"}
        always = {"goog:chromeOptions": options, "goog:loggingPrefs": logged}
        wanted = {"capabilities": {"alwaysMatch": always}}
        self._session = address
        self._session = f"{address}/{self._ask('', wanted)['sessionId']}"

    @staticmethod
    def is_installed() -> bool:
        return all(map(shutil.which, ("chromium", "chromedriver")))

    def open(self, address: str) -> None:
        """Go to a page; its text may come later."""
        self._ask("/url", {"url": address})

    def address(self) -> str:
        """Where the browser is."""
        return str(self.run("return location.href"))

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns on the open page."""
        return self._ask("/execute/sync", {"script": script, "args": list(arguments)})

    def text(self) -> str:
        """The text of the page that can be seen, or scrolled to."""
        return str(self.run("return document.body.innerText"))

    def wait(self, *words: str, seconds: float = 30) -> str:
        """Wait until the page's text has all of some words.

        Returns:
            The text.

        Raises:
            TimeoutError: it does not, with the text that it has.
        """
        text = ""

        def says() -> bool:
            nonlocal text
            text = self.text()
            return all(each in text for each in words)

        try:
            wait_for(says, seconds, f"the page says {words}")
        except TimeoutError as error:
            raise TimeoutError(f"{error}; it ends with:\n{text[-_SAID:]}") from None
        return text

    def requested(self) -> list[str]:
        """The addresses that pages have asked for since this was called last."""
        entries = self._ask("/se/log", {"type": "performance"})
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]

    def prefer(self, scheme: str) -> None:
        """Let pages be `light` or `dark`."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        command = {"cmd": "Emulation.setEmulatedMedia", "params": {"features": features}}
        self._ask("/goog/cdp/execute", command)

    def resize(self, width: int, height: int) -> None:
        """Give the window another size."""
        self._ask("/window/rect", {"width": width, "height": height})

    def click(self, words: str, whole: bool = True, seconds: float = 30) -> None:
        """Click the innermost element that has a text, as soon as it can be clicked.

        Args:
            whole: whether the words are all that it says.

        Raises:
            TimeoutError: there is none.
        """

        def clicked() -> bool:
            element = self.run(_FIND, words, whole)
            if element is None:
                return False
            (name,) = element.values()
            # Refused while something lies over it, or when the page has just drawn it anew.
            return self._post(f"/element/{name}/click", {}).ok

        try:
            wait_for(clicked, seconds, f"'{words}' can be clicked")
        except TimeoutError as error:
            raise TimeoutError(f"{error}; the page ends with:\n{self.text()[-_SAID:]}") from None

    def show(self, words: str) -> None:
        """Scroll the innermost element that has this text, and no more, to the middle.

        Raises:
            TimeoutError: there is none.
        """

        def shown() -> bool:
            element = self.run(_FIND, words, True)
            if element is None:
                return False
            self.run("arguments[0].scrollIntoView({block: 'center'})", element)
            return True

        wait_for(shown, 30, f"'{words}' is shown")

    def picture(self) -> bytes:
        """The page as it is seen, as PNG."""
        answer = requests.get(f"{self._session}/screenshot", timeout=60)
        return base64.b64decode(answer.json()["value"])

    def keep(self, path: Path, exact: bool = False) -> None:
        """Write the page as it is seen, with few colours, as a small PNG.

        Args:
            exact: whether these are the most frequent colours themselves, and not means of similar
                ones: for thin lines whose colours matter.
        """
        shown = Image.open(io.BytesIO(self.picture())).convert("RGB")
        few = shown.quantize(palette=_frequent(shown), dither=0) if exact else None
        # Not Pillow's usual method: of few coloured lines it makes grey ones.
        few = few or shown.quantize(_COLOURS, Image.Quantize.MAXCOVERAGE)
        few.save(path, optimize=True)

    def close(self) -> None:
        requests.delete(self._session, timeout=20)
        stop(self._driver.pid)

    def _post(self, path: str, what: Mapping[str, Any]) -> requests.Response:
        return requests.post(f"{self._session}{path}", json=what, timeout=60)

    def _ask(self, path: str, what: Mapping[str, Any]) -> Any:
        answer = self._post(path, what)
        value = answer.json()["value"]
        assert answer.ok, value
        return value


def _frequent(image: Image.Image) -> Image.Image:
    """A palette of the 256 most frequent colours of a picture."""
    counted: Any = image.getcolors(image.width * image.height)
    colours = [colour for _, colour in sorted(counted, reverse=True)][:256]
    palette = Image.new("P", (1, 1))
    palette.putpalette([part for colour in colours for part in colour])
    return palette


@contextmanager
def browsing(flags: Sequence[str] = ()) -> Iterator[Browser]:
    """A browser, until it is left; for `flags` see `Browser`."""
    # Chromium's socket needs a short path.
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = Browser(Path(folder), flags)
        try:
            yield browser
        finally:
            browser.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """What a condition gives as soon as it is true.

    Raises:
        TimeoutError: it is not in time.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        value = condition()
        if value:
            return value
        time.sleep(0.2)
    raise TimeoutError(f"not within {seconds:.0f} s: {what}")


def stop(pid: int) -> None:
    """End a process and whatever it started."""
    first = psutil.Process(pid)
    processes = [first, *first.children(recursive=True)]
    first.send_signal(signal.SIGINT)
    _, alive = psutil.wait_procs(processes, timeout=20)
    for process in alive:
        process.kill()


def look(browser: Browser, port: int, run: str, words: str, step: str | None = None) -> str:
    """Open a run's page in the UI; returns its text when it has some words.

    Args:
        step: chosen there, so that only its events are shown.
    """
    chosen = "" if step is None else f"?logs=step%3A{step}"
    browser.open(f"http://127.0.0.1:{port}/runs/{run}{chosen}")
    return browser.wait(words)
