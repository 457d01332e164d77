"""A small file system of memory, mounted in a namespace of a test's own."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from process_support import Done, python

_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000
"""CLONE_NEWNS and CLONE_NEWUSER of Linux."""


def can_mount() -> bool:
    """Whether a test may mount a file system in a namespace of its own."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


needs_a_disk = pytest.mark.skipif(not can_mount(), reason="a file system cannot be mounted here")


def mount(size: int, disk: Path) -> None:
    """Make a folder a file system of so many bytes, for this process alone and those that it starts."""
    user, group = os.getuid(), os.getgid()
    kinds = _NEW_MOUNTS if user == 0 else _NEW_MOUNTS | _NEW_USER
    if ctypes.CDLL(None, use_errno=True).unshare(kinds) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)


def on_a_small_disk(size: int, disk: Path, *arguments: str) -> Done:
    """Run Python with arguments where the folder `disk` is a file system of so many bytes."""
    disk.mkdir(exist_ok=True)
    return python(*arguments, first=(mount, size, disk))
