"""Captions that are lists of tags, in several orders of the tags."""

from dataclasses import dataclass

import polars as pl
from blake3 import blake3


@dataclass(frozen=True)
class TagOrders:
    """The orders in which the tags of a caption are encoded. They depend on the caption alone.

    Attributes:
        count: number of orders of each caption; the first is the caption as it is written.
        kept: number of tags at the beginning that are not shuffled.
        prefix: a text before the tags, followed by a space, that stays there: see `caption_prefix`.
    """

    count: int
    kept: int
    prefix: str | None = None

    def of(self, caption: str) -> list[str]:
        """The `count` orders of a caption. If it has few tags, some of them are equal."""
        head = f"{self.prefix} " if self.prefix is not None else ""
        if not caption.startswith(head):  # the caption is the prefix alone, without a tag
            return [caption] * self.count
        tags = [tag.strip() for tag in caption.removeprefix(head).split(",")]
        tags = [tag for tag in tags if tag]
        first, others = tags[: self.kept], tags[self.kept :]
        orders = [caption]
        for number in range(1, self.count):
            # Draw 64 bits for each tag from a digest of the caption, and sort the tags by them:
            # the same on every machine and in every version of the libraries.
            source = blake3(f"{number}\x1f{caption}".encode()).digest(length=8 * len(others))
            drawn = [source[place * 8 : place * 8 + 8] for place in range(len(others))]
            shuffled = [
                others[place] for place in sorted(range(len(others)), key=drawn.__getitem__)
            ]
            orders.append(head + ", ".join([*first, *shuffled]))
        return orders

    def of_lists(self, captions: pl.Series) -> pl.Series:
        """For each list of captions, a list of the orders of all its captions."""
        orders = [[order for text in texts for order in self.of(text)] for texts in captions]
        return pl.Series(captions.name, orders, dtype=pl.List(pl.String))
