"""`python -m diffsynth_dagster.cache verify|stats|gc`: check, measure and clean up the store."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from diffsynth_dagster.cache.store import Store
from diffsynth_dagster.cache.upkeep import collect, statistics, verify
from diffsynth_dagster.config.parameters import DatasetParameters
from diffsynth_dagster.errors import EXIT_USER_ERROR, StoreError, UserError

_MEBIBYTE = 1024 * 1024


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m diffsynth_dagster.cache", description=__doc__)
    default = DatasetParameters.model_fields["cache_path"].default
    # As a parent of every command, so that the option stands behind the command's name.
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--cache_path", default=default, help=f"the store; {default} if left out")
    commands = parser.add_subparsers(dest="command", required=True)
    checks = commands.add_parser("verify", parents=[shared], help="check every file and tensor")
    checks.add_argument(
        "--drop", action="store_true", help="remove what is damaged, so that it is encoded again"
    )
    commands.add_parser(
        "stats", parents=[shared], help="show what is stored and which run folders use it"
    )
    commands.add_parser("gc", parents=[shared], help="remove what no run folder uses")
    return parser


def _verify(store: Store, drop: bool) -> int:
    found = verify(store, drop)
    print(f"{found.tensors} tensors in {found.shards} shards: {len(found.damaged)} files damaged")
    if found.outdated:
        print(
            f"{found.outdated} shards are of an older version, which did not notice files that "
            "changed while it encoded; they are not read any more: `gc` removes them"
        )
    for file, problem in found.damaged.items():
        print(f"  {file}: {problem}" + ("; dropped" if drop else ""))
    if found.damaged and not drop:
        print(
            "what to do: run it again with --drop, then start the trainings that use the store "
            "again: only what was lost is encoded"
        )
    # 0 after `--drop`: no damage is left.
    return 1 if found.damaged and not drop else 0


def _stats(store: Store) -> int:
    found = statistics(store)
    print(f"{found.keys} encoded inputs, {found.bytes / _MEBIBYTE:.1f} MiB")
    print(f"  used: {found.used_bytes / _MEBIBYTE:.1f} MiB")
    print(f"  stored twice: {found.duplicate_bytes / _MEBIBYTE:.1f} MiB")
    print(f"  files that nothing names: {found.stray_files}")
    for use in found.uses:
        print(
            f"{use.folder}: {use.keys} inputs, {use.bytes / _MEBIBYTE:.1f} MiB, "
            f"{use.own_bytes / _MEBIBYTE:.1f} MiB used by no other"
        )
    return 0


def _gc(store: Store) -> int:
    done = collect(store)
    print(
        f"removed {done.removed_keys} encoded inputs and {done.removed_files} files, "
        f"{done.freed_bytes / _MEBIBYTE:.1f} MiB"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Returns:
        The exit code: 1 if `verify` leaves damage in the store, 2 for a mistake of the user.
    """
    options = _parser().parse_args(argv)
    store = Store(Path(options.cache_path))
    try:
        # A mistyped path would pass for an empty store.
        if not (store.path / "index").is_dir():
            raise StoreError(
                "there is no store", where=str(store.path), do="name it with --cache_path"
            )
        if options.command == "verify":
            return _verify(store, options.drop)
        return _stats(store) if options.command == "stats" else _gc(store)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
