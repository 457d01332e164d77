"""Edits of a recipe and of its data, as a person makes them by day."""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dagster_support import write_recipe
from PIL import Image

EDITS = ("caption", "added", "removed", "parameter", "formats", "nothing")
FORMATS = (["comfyui"], ["comfyui", "kohya"], ["diffusers", "peft"], ["kohya"])


@dataclass
class Recipe:
    """A recipe and its data set, as edits leave them; `write` puts both where they are read."""

    source: random.Random
    path: Path
    data: Path
    values: dict[str, Any]
    captions: dict[str, str] = field(default_factory=dict[str, str])
    made: int = 0

    def edit(self, kind: str) -> None:
        source, names = self.source, list(self.captions)
        if kind == "caption":
            self.captions[source.choice(names)] = f"drawing {source.randrange(1000)}"
        elif kind == "removed" and len(names) > 4:
            name = source.choice(names)
            del self.captions[name]
            self._write_table()
            (self.data / name).unlink()
        elif kind in ("added", "removed"):
            self.add()
        elif kind == "parameter":
            name, values = source.choice(
                [("learning_rate", [1e-3, 2e-3, 5e-4]), ("seed", [0, 1, 2])]
            )
            self.values[name] = source.choice([v for v in values if v != self.values.get(name)])
        elif kind == "formats":
            others = [f for f in FORMATS if f != self.values["export_formats"]]
            self.values["export_formats"] = source.choice(others)
        self._write_table()
        if kind in ("parameter", "formats"):
            self.write()

    def add(self) -> None:
        self.made += 1
        name = f"new-{self.made}.png"
        colour = tuple(self.source.randrange(256) for _ in range(3))
        Image.new("RGB", (32, 32), colour).save(self.data / name)
        self.captions[name] = f"picture {self.made}"

    def write(self) -> None:
        write_recipe(self.path.parent, self.path.stem, self.values)

    def _write_table(self) -> None:
        rows = "".join(f'{name},"{caption}"\n' for name, caption in self.captions.items())
        staged = self.data.parent / "staged.csv"
        staged.write_text(f"image,prompt\n{rows}", encoding="utf-8")
        staged.replace(self.data / "metadata.csv")

    @property
    def state(self) -> str:
        """Stands for what is to be made."""
        return json.dumps([self.captions, self.values], sort_keys=True)
