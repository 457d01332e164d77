"""Tables that rename tensors: how names start in one layout → how they start in another."""

from collections.abc import Mapping

from diffsynth_dagster.families.contract import Tensors


def with_new_start(name: str, starts: Mapping[str, str]) -> str:
    """A name with its start replaced by the first entry that fits; unchanged where none does."""
    for old, new in starts.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def with_new_starts(tensors: Tensors, starts: Mapping[str, str]) -> Tensors:
    """Tensors whose names get new starts: see `with_new_start`."""
    return {with_new_start(name, starts): tensor for name, tensor in tensors.items()}
