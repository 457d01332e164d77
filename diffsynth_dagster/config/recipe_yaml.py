"""Reads the YAML of a recipe, with limits on its size and content.

Recipes may come from anyone, and every process of Dagster reads all of them. One bad file must not
slow down or crash the whole code location.
"""

import errno
from pathlib import Path
from typing import Any

import yaml

from diffsynth_dagster.errors import ParameterError, is_text

LARGEST = 1 << 20
"""Most bytes of a recipe's file, and most characters of its values with all aliases expanded."""
_MOST_VALUES = 10_000
"""Most values, keys and brackets in a file; reading that many takes half a second."""
_DEEPEST = 50
"""Most brackets inside each other."""
_TAG = "tag:yaml.org,2002:"
_NUMBERS = (f"{_TAG}int", f"{_TAG}float")
_OPEN = (0, 0)
"""What `_measure` notes for a value while it measures its parts."""


class _Loader(yaml.SafeLoader):
    """A stricter loader than PyYAML's safe one.

    It refuses duplicate keys, keys that are not plain text, aliases that expand to very much, and
    characters that neither file names nor databases can hold (NUL, lone surrogates). Dates and
    numbers in base 60 (1:30) are read as text, since no parameter is one.
    """

    # Without the resolver of timestamps, which turns 2024-01-01 into a date.
    yaml_implicit_resolvers = {  # noqa: RUF012 - as the base class declares it
        first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_TAG}timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Read the next value; a number in base 60 as text.

        Args:
            parent: the mapping or list that the value is in.
            index: its key or its place there; None for a key itself.

        Raises:
            yaml.YAMLError: there are too many values, or a key is not plain text.
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
        """The value of the whole text. Raises `yaml.YAMLError`."""
        _measure(node, {})  # before anything is built: expanding aliases could fill the memory
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
            if key_node.tag == f"{_TAG}merge":  # `<<: *other`, which may stand several times
                continue
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise _refused(f"the key '{key}' stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """(characters, depth of brackets) of a value with all aliases expanded.

    Args:
        known: id of a node → its measures.

    Raises:
        yaml.YAMLError: the value is too large or too deep, or contains itself.
    """
    # An alias is the very same node object as what it stands for: it is measured only once, so that
    # aliases of aliases ("billion laughs") cost no time.
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
    """An error that names the line of `mark`."""
    return yaml.constructor.ConstructorError(None, None, what, mark)


def load_yaml(path: Path) -> Any:
    """The content of a recipe's file.

    Raises:
        ParameterError: the file cannot be read, is larger than 1 MiB, or is not YAML that `_Loader`
            accepts. Then the message names the line.
    """
    where = str(path)
    try:
        if path.exists() and not path.is_file():  # opening a named pipe may block for ever
            raise OSError(errno.EINVAL, "it is not a regular file")
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)  # one byte more tells that it is too large
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
    # PyYAML raises a plain ValueError for numbers such as 0x_, or with more than 4,300 digits.
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
