"""How much of a caption a text encoder reads, and how many tokens a caption has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TokenLimit:
    """The most that a stage reads of a caption: what lies behind is cut off.

    Attributes:
        tokenizer: its name; it is among what the stage uses.
        most: tokens, those counted that stand around the caption.
        prepared: caption → what the tokenizer is given.
        before: what this begins with for every caption; it is read beside `most`.
        advice: how more of a caption is read, where that is possible.
    """

    tokenizer: str
    most: int
    prepared: Callable[[str], str] = str
    before: str = ""
    advice: str = ""

    @property
    def always_read(self) -> int:
        """Bytes of UTF-8 that never are more than `most` tokens, if they are ASCII: a token stands for a
        byte at least. A few are set aside for what the tokenizer and `prepared` add."""
        added = len(self.prepared("").encode()) - len(self.before.encode())
        return max(0, self.most - added - _ADDED)

    def count(self, tokenizer: Any, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption, as `most` counts them."""

        def lengths(texts: list[str]) -> list[int]:
            rows = tokenizer(texts, return_attention_mask=False, verbose=False).input_ids
            return [len(row) for row in rows]

        before = lengths([self.before])[0] if self.before else 0
        return [n - before for n in lengths([self.prepared(text) for text in captions])]


_ADDED = 4
"""Tokens for begin, end, and a space in front."""
MOST_BYTES_OF_ONE = 6
"""How much longer a normalised text may be, where it is not ASCII: one character of three bytes can
stand for eighteen letters (U+FDFA)."""
