"""Captions that are tags, in several orders."""

from dataclasses import dataclass

import polars as pl

from diffsynth_dagster.facts import digest_text


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

            def drawn(place: int, number: int = number) -> str:
                return digest_text(f"{number}\x1f{place}\x1f{caption}")

            shuffled = [others[place] for place in sorted(range(len(others)), key=drawn)]
            orders.append(head + ", ".join([*first, *shuffled]))
        return orders

    def of_lists(self, captions: pl.Series) -> pl.Series:
        """Lists of captions → lists of the orders of all of them."""
        made = [[order for text in texts for order in self.of(text)] for texts in captions]
        return pl.Series(captions.name, made, dtype=pl.List(pl.String))
