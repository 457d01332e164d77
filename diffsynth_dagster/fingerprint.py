"""Record what a result was made from, and compare two such records."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from diffsynth_dagster.errors import shown


@dataclass(frozen=True)
class Fingerprint:
    """What a result was made from: values of parameters, and digests of files and samples.

    Attributes:
        parts: name → JSON value or digest. Digests, which messages do not show, have names that
            begin with "the ".
    """

    parts: Mapping[str, Any]

    def differs(self, other: "Fingerprint", among: Iterable[str] | None = None) -> tuple[str, ...]:
        """The names of the parts that differ, in order. A missing part counts as None.

        Args:
            among: the names to compare; None for all names of both.
        """
        # A dict, not a set, to keep the order.
        names = {**self.parts, **other.parts} if among is None else among
        return tuple(name for name in names if self.parts.get(name) != other.parts.get(name))

    def changes(self, now: "Fingerprint") -> list[str]:
        """The parts that are different in `now`, for a message: `name (was value)`."""
        return [
            name if name.startswith("the ") else f"{name} (was {shown(self.parts.get(name))})"
            for name in self.differs(now)
        ]
