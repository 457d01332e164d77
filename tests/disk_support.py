"""A small file system in memory, to test full disks. Only the test's own processes see it."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from process_support import Done, python

_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000
"""Linux's CLONE_NEWNS and CLONE_NEWUSER."""


def can_mount() -> bool:
    """Whether tests may mount a file system in a mount namespace of their own."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


needs_a_disk = pytest.mark.skipif(not can_mount(), reason="a file system cannot be mounted here")


def mount(size: int, disk: Path) -> None:
    """Mount a file system of `size` bytes on a folder, for this process and its children only."""
    user, group = os.getuid(), os.getgid()
    # A user that is not root may mount only as the root of a user namespace.
    kinds = _NEW_MOUNTS if user == 0 else _NEW_MOUNTS | _NEW_USER
    if ctypes.CDLL(None, use_errno=True).unshare(kinds) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    # Without this, the mount would be visible in the parent namespace, too.
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)


def on_a_small_disk(size: int, disk: Path, *arguments: str) -> Done:
    """Run Python with the folder `disk` being a file system of `size` bytes."""
    disk.mkdir(exist_ok=True)
    return python(*arguments, first=(mount, size, disk))
