"""How much of a caption a text encoder reads, and how many tokens a caption has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TokenLimit:
    """How many tokens of a caption a stage reads. The rest of the caption is cut off.

    Attributes:
        tokenizer: name of the tokenizer, which the stage must list in `uses`.
        most: the maximum number of tokens, with special tokens and the template's suffix.
        prepared: caption → the text that is tokenized, such as the caption in a template.
        before: the prefix that `prepared` adds. Its tokens do not count towards `most`.
        advice: what the user can do about long captions; empty for the usual advice.
    """

    tokenizer: str
    most: int
    prepared: Callable[[str], str] = str
    before: str = ""
    advice: str = ""

    @property
    def always_read(self) -> int:
        """The length in bytes up to which an ASCII caption never exceeds `most` tokens.

        Every token covers at least one byte, so short captions need not be tokenized to be checked.
        """
        template = len(self.prepared("").encode()) - len(self.before.encode())
        return max(0, self.most - template - _SPECIAL_TOKENS)

    def count(self, tokenizer: Any, captions: Sequence[str]) -> list[int]:
        """The number of tokens of each caption, counted as for `most`."""

        def lengths(texts: list[str]) -> list[int]:
            rows = tokenizer(texts, return_attention_mask=False, verbose=False).input_ids
            return [len(row) for row in rows]

        prefix = lengths([self.before])[0] if self.before else 0
        return [n - prefix for n in lengths([self.prepared(text) for text in captions])]


_SPECIAL_TOKENS = 4
"""Tokens reserved for begin, end, and a space in front, rounded up."""
MOST_BYTES_OF_ONE = 6
"""How much longer text that is not ASCII can become when the tokenizer normalises it: U+FDFA has
three bytes and becomes eighteen letters."""
