"""What something was made from, and in what that differs from something else."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from diffsynth_dagster.errors import shown


@dataclass(frozen=True)
class Fingerprint:
    """What something was made from: parameters by their JSON values, files and samples by their digests.

    Attributes:
        parts: name → value or digest. What a person cannot read has a name that begins with "the ".
    """

    parts: Mapping[str, Any]

    def differs(self, other: "Fingerprint", among: Iterable[str] | None = None) -> tuple[str, ...]:
        """The names of what differs, in order. What only one of the two has is None in the other.

        Args:
            among: the names to compare; None for all that either of the two has.
        """
        names = {**self.parts, **other.parts} if among is None else among
        return tuple(name for name in names if self.parts.get(name) != other.parts.get(name))

    def changes(self, now: "Fingerprint") -> list[str]:
        """What has changed since, for a message: each name, with the value from before if it has one."""
        return [
            n if n.startswith("the ") else f"{n} (was {shown(self.parts.get(n))})"
            for n in self.differs(now)
        ]
