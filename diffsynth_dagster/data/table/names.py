"""Messages that help to correct a value that names no file of the data set."""

import os
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

_LONGEST = 300
_FORMS = ("NFC", "NFD")


def outside(named: Path, real: Path) -> str:
    """The message about a file outside the data set's folder: where it is, and how to allow it.

    Args:
        named: the path that the table's value names, before links are followed.
        real: the file after links are followed.
    """
    is_link = os.path.normpath(named) != str(real)
    place = f"a link leads to {real}"[:_LONGEST] if is_link else f"it is {real}"[:_LONGEST]
    return (
        f"{place}: move it there, or set allow_outside_base_path if the table may name such files"
    )


@dataclass(frozen=True)
class LookAlikes:
    """Finds files whose names look the same as a table's value but differ in the Unicode form.

    `é` is one character in the form NFC, and a letter followed by an accent in NFD, which older
    file systems of Apple use. For most file systems these are two different names.

    Attributes:
        root: the folder that values are relative to.
    """

    root: str
    _listed: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])

    def of(self, value: str) -> str | None:
        """The message about a missing file if the name of another looks the same; else None."""
        if value.isascii():  # ASCII has one form only
            return None
        path = os.path.join(self.root, value)
        found = self._find(path)
        if found is None or found == path:
            return None
        table, file = (_form(os.path.relpath(each, self.root)) for each in (path, found))
        forms = f" (the table's is {table}, the file's {file})" if table and file else ""
        return (
            f"there is a file whose name looks the same in another Unicode form{forms}: rename it, "
            "or write its name into the table as it is"
        )

    def _find(self, path: str) -> str | None:
        """The existing path that equals `path` apart from its Unicode form, if there is one."""
        if self._if_exists(path):
            return path
        folder, name = os.path.split(path)
        if not name or folder == path:
            return None
        # Folders may be in another form, too: find the parent first.
        parent = self._find(folder)
        if parent is None:
            return None
        if name.isascii():
            return self._if_exists(os.path.join(parent, name))
        if parent not in self._listed:  # list each folder once, however many names are missing
            self._listed[parent] = _names(parent)
        known = self._listed[parent].get(unicodedata.normalize("NFC", name))
        return None if known is None else os.path.join(parent, known)

    @staticmethod
    def _if_exists(path: str) -> str | None:
        return path if os.path.lexists(path) else None


def _names(folder: str) -> dict[str, str]:
    """The names in a folder that are not ASCII: name in NFC → name as it is."""
    try:
        names = [name for name in os.listdir(folder) if not name.isascii()]
    except OSError:
        return {}
    return {unicodedata.normalize("NFC", name): name for name in names}


def _form(name: str) -> str | None:
    """The Unicode form of a name, NFC or NFD; None if it is in both forms or in neither."""
    forms = [form for form in _FORMS if unicodedata.is_normalized(form, name)]
    return forms[0] if len(forms) == 1 else None
