"""Captions that are tags, in several orders."""

from dataclasses import dataclass

import polars as pl
from blake3 import blake3


@dataclass(frozen=True)
class TagOrders:
    """How the tags of a caption are ordered: a function of the caption alone.

    Attributes:
        count: orders of each caption; the first is the caption as it is written.
        kept: tags that stay where they are, at the beginning.
        prefix: text before the tags, with a space between, that stays; see `caption_prefix`.
    """

    count: int
    kept: int
    prefix: str | None = None

    def of(self, caption: str) -> list[str]:
        """The orders of a caption. Of few tags, or none, some are equal."""
        head = f"{self.prefix} " if self.prefix is not None else ""
        if not caption.startswith(head):  # the prefix alone, without a tag
            return [caption] * self.count
        tags = [tag.strip() for tag in caption.removeprefix(head).split(",")]
        tags = [tag for tag in tags if tag]
        first, others = tags[: self.kept], tags[self.kept :]
        orders = [caption]
        for number in range(1, self.count):
            # A number of 64 bits for each tag, to sort them by.
            source = blake3(f"{number}\x1f{caption}".encode()).digest(length=8 * len(others))
            drawn = [source[place * 8 : place * 8 + 8] for place in range(len(others))]
            shuffled = [
                others[place] for place in sorted(range(len(others)), key=drawn.__getitem__)
            ]
            orders.append(head + ", ".join([*first, *shuffled]))
        return orders

    def of_lists(self, captions: pl.Series) -> pl.Series:
        """Lists of captions → lists of the orders of all of them."""
        made = [[order for text in texts for order in self.of(text)] for texts in captions]
        return pl.Series(captions.name, made, dtype=pl.List(pl.String))
