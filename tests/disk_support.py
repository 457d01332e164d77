"""A small file system of memory, mounted in a namespace of a test's own."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

_MOUNTED = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'


def can_mount() -> bool:
    """Whether a test may mount a file system in a namespace of its own."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


needs_a_disk = pytest.mark.skipif(not can_mount(), reason="a file system cannot be mounted here")


def on_a_small_disk(size: int, disk: Path, *command: str, **more: Any) -> Any:
    """Run a Python command where the folder `disk` is a file system of so many bytes."""
    disk.mkdir(exist_ok=True)
    shell = ["sh", "-c", _MOUNTED, "sh", str(size), str(disk)]
    return subprocess.run(
        ["unshare", "-rm", *shell, sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        **more,
    )
