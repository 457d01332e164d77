"""Reads the YAML of a recipe, within bounds: nobody knows who wrote it, and every process of Dagster
reads all of them.
"""

import errno
from pathlib import Path
from typing import Any

import yaml

from diffsynth_dagster.errors import ParameterError, is_text

LARGEST = 1 << 20
"""Bytes of a recipe's file, and characters of its values with each alias as what it stands for."""
_MOST_VALUES = 10_000
"""Values, keys and brackets as they are written; reading so many takes half a second."""
_DEEPEST = 50
_TAG = "tag:yaml.org,2002:"
_NUMBERS = (f"{_TAG}int", f"{_TAG}float")
_OPEN = (0, 0)
"""What `_measure` knows of a value that it is in the middle of."""


class _Loader(yaml.SafeLoader):
    """A loader that refuses what YAML's own accepts: a key that stands twice, a key that is no plain
    text, aliases that stand for very much, and characters that no file can be named with and no
    database keeps. It reads a date and a number in base 60 (1:30) as text: no parameter is one.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - as the base class declares it
        first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_TAG}timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next value of the text, a number in base 60 as text.

        Args:
            parent, index: what it is a part of, and where; a key has a parent and no index.

        Raises:
            yaml.YAMLError: there are too many values, or a key is no plain text.
        """
        start = self.peek_event().start_mark
        self._values += 1
        if self._values > _MOST_VALUES:
            raise _refused(f"it has more than {_MOST_VALUES:,} values", start)
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.ScalarNode):
            if node.tag in _NUMBERS and ":" in node.value:
                node.tag = f"{_TAG}str"
        elif parent is not None and index is None:
            raise _refused("a key must be plain text", start)
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        """What the whole text says. Raises `yaml.YAMLError`."""
        _measure(node, {})
        return super().construct_document(node)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """The text of a value. Raises `yaml.YAMLError`."""
        text = super().construct_scalar(node)
        if not is_text(str(text)):
            raise _refused("a NUL, or half of a surrogate pair, is no text", node.start_mark)
        return text

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping. Raises `yaml.YAMLError`."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == f"{_TAG}merge":
                continue
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise _refused(f"the key '{key}' stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many characters a value has, and how many brackets inside each other, with each alias as
    what it stands for. An alias is the same node again, which is measured once.

    Args:
        known: id of a node → its measures.

    Raises:
        yaml.YAMLError: it is too large, or stands for itself.
    """
    if known.get(id(node)) == _OPEN:
        raise _refused("an alias stands for a value that it is a part of", node.start_mark)
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = _OPEN
    inside = [_measure(part, known) for part in _parts(node)]
    size = 1 + sum(s for s, _ in inside)
    depth = 1 + max((d for _, d in inside), default=0)
    if isinstance(node, yaml.ScalarNode):
        size += len(node.value)
    if depth > _DEEPEST:
        raise _refused(f"it has more than {_DEEPEST} brackets inside each other", node.start_mark)
    if size > LARGEST:
        raise _refused("its aliases stand for more than 1 MiB", node.start_mark)
    known[id(node)] = size, depth
    return size, depth


def _parts(node: yaml.Node) -> list[yaml.Node]:
    """The keys and values of a mapping, or the items of a list."""
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _refused(what: str, mark: yaml.Mark) -> yaml.YAMLError:
    """The error that names a line."""
    return yaml.constructor.ConstructorError(None, None, what, mark)


def load_yaml(path: Path) -> Any:
    """What a recipe's file says.

    Raises:
        ParameterError: it cannot be read, is larger than 1 MiB, or is no YAML that a recipe may have;
            that says the line.
    """
    where = str(path)
    try:
        if path.exists() and not path.is_file():  # a pipe may wait for its writer for ever
            raise OSError(errno.EINVAL, "it is not a regular file")
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)  # no more of it, whatever it is
        if len(content) > LARGEST:
            raise ParameterError(
                "the recipe is larger than 1 MiB, which is the limit",
                where=where,
                do="name a recipe; captions and rows go into the metadata of the data set",
            )
        return yaml.load(content.decode("utf-8"), _Loader)  # a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ParameterError(
            f"the recipe cannot be read: {reason}",
            where=str(path.absolute()),
            do="name a YAML file",
        ) from error
    # A ValueError: 0x_, or a number of 5,000 digits.
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        message = " ".join(str(error).split())
        raise ParameterError(
            f"the recipe is not YAML: {message}", where=where, do="correct that line"
        ) from error
    except RecursionError as error:
        raise ParameterError(
            "the recipe has too many brackets inside each other",
            where=where,
            do="write one `name: value` in each line",
        ) from error
