"""What is said of a value that names no file of the data set, so that it can be mended."""

import os
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

_LONGEST = 300
_FORMS = ("NFC", "NFD")


def outside(named: Path, real: Path) -> str:
    """What is said of a file outside the data set's folder: where it lies, and how it is allowed.

    Args:
        named: the folder and the value of the table.
        real: the file, links followed.
    """
    is_link = os.path.normpath(named) != str(real)
    place = f"a link leads to {real}"[:_LONGEST] if is_link else f"it is {real}"[:_LONGEST]
    return (
        f"{place}: move it there, or set allow_outside_base_path if the table may name such files"
    )


@dataclass(frozen=True)
class LookAlikes:
    """Finds files whose names look the same as those of a table in another Unicode form.

    `é` is one character in one form (NFC) and a letter with an accent in another (NFD, which older
    file systems of Apple write). Most file systems take them for two names.

    Attributes:
        root: the folder that values start from.
    """

    root: str
    _listed: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])

    def of(self, value: str) -> str | None:
        """What is said of a value whose file is missing and one that looks the same is there."""
        if value.isascii():
            return None
        place = os.path.join(self.root, value)
        found = self._find(place)
        if found is None or found == place:
            return None
        table, file = (_form(os.path.relpath(each, self.root)) for each in (place, found))
        forms = f" (the table's is {table}, the file's {file})" if table and file else ""
        return (
            f"there is a file whose name looks the same in another Unicode form{forms}: rename it, "
            "or write its name into the table as it is"
        )

    def _find(self, place: str) -> str | None:
        """The file whose path is that of `place` but for its form, if there is one."""
        if self._if_there(place):
            return place
        folder, name = os.path.split(place)
        if not name or folder == place:
            return None
        parent = self._find(folder)
        if parent is None:
            return None
        if name.isascii():  # it has one form
            return self._if_there(os.path.join(parent, name))
        if parent not in self._listed:
            self._listed[parent] = _names(parent)
        known = self._listed[parent].get(unicodedata.normalize("NFC", name))
        return None if known is None else os.path.join(parent, known)

    @staticmethod
    def _if_there(place: str) -> str | None:
        return place if os.path.lexists(place) else None


def _names(folder: str) -> dict[str, str]:
    """What a folder holds: names in NFC → names. Those of ASCII are left out."""
    try:
        names = [name for name in os.listdir(folder) if not name.isascii()]
    except OSError:
        return {}
    return {unicodedata.normalize("NFC", name): name for name in names}


def _form(name: str) -> str | None:
    """NFC or NFD, if the name is in one of the two alone."""
    forms = [form for form in _FORMS if unicodedata.is_normalized(form, name)]
    return forms[0] if len(forms) == 1 else None
