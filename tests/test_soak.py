"""Kills at random moments and damage to random files: what comes of it is what an undisturbed run
makes, or a message names what was damaged and what it says cures.

A round takes a pipeline through its steps, by assets or as one command, kills some attempts, and
damages one file of those that the pipeline wrote after each kill. Which files those are is looked up
on the disk: what a new kind of file needs is nothing, what a new step needs is a line in `STEPS` of
`soak_support` and in `WAYS`.
"""

import os
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import lora_values, write_images
from damage_support import DAMAGE
from soak_support import NO_DEATH, Attempt, Death, make_attempt, result, start_server

from diffsynth_dagster.cache.__main__ import main as maintain

WAYS = {
    "assets": ("table", "latents", "checkpoints", "exports"),
    "command": ("command", "exports"),
}
"""A step that fails by damage done before it is tried anew, as Dagster does it: not those before it."""
_KILLED = {"table": 1, "latents": 4, "checkpoints": 4, "exports": 2, "command": 6}
"""How often each step is killed, in proportion."""
_AGAIN: list[tuple[str, str]] = [
    ("materialize the metadata", "table"),
    ("check it again", "table"),
    ("encode", "latents"),
    ("train again", "checkpoints"),
    ("training is then run again", "checkpoints"),
    ("materialize the checkpoints", "checkpoints"),
]
"""What a message may say is to be done → the step that does it."""


@dataclass
class Figures:
    """What was done, and what came of it."""

    kills: Counter[str] = field(default_factory=Counter)
    damage: Counter[str] = field(default_factory=Counter)
    files: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    compared: int = 0

    def __str__(self) -> str:
        parts = {
            f"{self.kills.total()} kills in": self.kills,
            f"{self.damage.total()} times damage": self.damage,
            "to": self.files,
            f"{self.messages.total()} messages": self.messages,
        }
        lines = [
            f"{self.attempts} attempts, {self.compared} results equal to the undisturbed one's"
        ]
        for title, counter in parts.items():
            counted = ", ".join(f"{name} {n}" for name, n in sorted(counter.items()))
            lines.append(f"{title}: {counted or 'none'}")
        return "\n  ".join(lines)


class Soak:
    """A recipe that is run again and again in one folder.

    Args:
        values: the recipe, but for where it writes.
        wanted: what an undisturbed run leaves, and step → how its attempt went.
    """

    def __init__(
        self,
        server: Any,
        folder: Path,
        values: dict[str, Any],
        seed: int,
        wanted: dict[str, Any] | None = None,
        lengths: dict[str, Attempt] | None = None,
    ) -> None:
        self.run, self.store = folder / "run", folder / "store"
        self.recipe = folder / "recipe.yaml"
        folder.mkdir()
        places = {"output_path": str(self.run), "cache_path": str(self.store)}
        self.recipe.write_text(yaml.safe_dump({**values, **places}), encoding="utf-8")
        self.figures = Figures()
        self.history: list[str] = []
        self._server = server
        self._source = random.Random(seed)
        self._wanted = wanted or {}
        self._lengths = lengths or {}
        self._damaged: dict[Path, bytes | None] = {}  # and what was left of them
        self._unneeded: set[str] = set()
        self._to_kill: Counter[str] = Counter()

    def undisturbed(self, way: str) -> dict[str, Attempt]:
        """Run all steps; step → its attempt."""
        done = {step: make_attempt(self._server, step, self.recipe) for step in WAYS[way]}
        assert not any(attempt.code for attempt in done.values()), done
        return done

    def round(self, kills: int) -> None:
        """From a random start to a result, with at most so many kills; and once more, with damage to
        what is finished."""
        way = self._source.choice(sorted(WAYS))
        kept = self._source.choice(["nothing", "nothing", "the store", "all"])
        self.history.append(f"a round by {way}, kept: {kept}")
        for folder, names in ((self.run, ("the store", "nothing")), (self.store, ("nothing",))):
            if kept in names:
                shutil.rmtree(folder, ignore_errors=True)
                self._keep_damage(lambda path, folder=folder: folder not in path.parents)
        weights = [_KILLED[step] for step in WAYS[way]]
        self._to_kill = Counter(self._source.choices(WAYS[way], weights, k=kills))
        self._complete(way, 0)
        self._compare(way)
        if self._source.random() < 0.5:
            self._damage()
            self._complete(way, self._source.randrange(len(WAYS[way])))
            self._compare(way)

    def _complete(self, way: str, step: int, quietly: bool = False) -> None:
        """Try the steps of a way, from one of them on, until the last one is done.

        Args:
            quietly: without kills and new damage.
        """
        refused = 0
        while step < len(WAYS[way]):
            name = WAYS[way][step]
            death = self._death(name) if self._to_kill[name] and not quietly else NO_DEATH
            attempt = make_attempt(self._server, name, self.recipe, death)
            self.figures.attempts += 1
            self.history.append(f"{name} {death}: {attempt.code}")
            if attempt.code is None:
                self._to_kill[name] -= 1
                self.figures.kills[self._stage(name)] += 1
                self._damage()
                step = 0 if self._source.random() < 0.2 else step
            elif attempt.code == 0:
                self._hear(attempt.said)
                step, refused = step + 1, 0
                if step < len(WAYS[way]) and not quietly and self._source.random() < 0.3:
                    self._damage(written_by_run=True)  # what the next step reads
            else:
                refused += 1
                assert refused < 4, self._story("what the messages say does not cure", attempt.said)
                step = self._heed(way, attempt)

    def _death(self, step: str) -> Death:
        """When to kill: at a touch of a file, or after some time."""
        length = self._lengths[step]
        if self._source.random() < 0.5:
            return Death(touch=self._source.randint(1, length.touched))
        return Death(seconds=self._source.uniform(0.0, length.seconds))

    def _stage(self, step: str) -> str:
        """What an attempt that was killed was about."""
        if step != "command":
            return step
        trains = "run.json" in {path.name for path in self.run.glob("*")}
        return "command: training" if trains else "command: encoding"

    def _files(self) -> dict[str, list[Path]]:
        """Kind of file → the files that the pipeline wrote, and left."""
        found: dict[str, list[Path]] = {}
        for folder in (self.run, self.store):
            for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                name = str(path.relative_to(folder.parent))
                left = re.search(r"[0-9a-f]{8}-\d+-[0-9a-f]{8}$", name)
                kind = "leftovers" if left else re.sub(r"[0-9a-f]{32}|(?<=epoch-)\d+", "*", name)
                found.setdefault(kind, []).append(path)
        return found

    def _damage(self, written_by_run: bool = False) -> None:
        """Damage one file.

        Args:
            written_by_run: one in the run folder that is no hidden one.
        """
        files = self._files()
        if written_by_run:
            files = {kind: paths for kind, paths in files.items() if re.match(r"run/[^.]", kind)}
        if not files:
            return
        kind = self._source.choice(sorted(files))
        path = self._source.choice(files[kind])
        content, node = path.read_bytes(), path.stat().st_ino
        how = self._source.choice([*DAMAGE, None]) if content else None
        if how is None:
            path.unlink()
        else:
            path.write_bytes(how(content, self._source))
        done = "deleted" if how is None else how.__name__
        self.figures.damage[done] += 1
        self.figures.files[kind] += 1
        if how is None:
            self._damaged[path] = None
        else:  # a file may have several names
            same = [p for paths in self._files().values() for p in paths if p.stat().st_ino == node]
            self._damaged |= dict.fromkeys(same, path.read_bytes())
        self.history.append(f"  {done}: {path.relative_to(self.run.parent)}")

    def _keep_damage(self, where: Callable[[Path], bool]) -> None:
        """Forget damage elsewhere, and what was written anew since."""
        self._damaged = {
            path: left
            for path, left in self._damaged.items()
            if where(path) and left == (path.read_bytes() if path.exists() else None)
        }

    def _hear(self, said: str) -> None:
        """Take in what a step says of damage that it does not mind: what is for people to look at is not
        made anew."""
        named = re.findall(r"warning: .*\n  where: (.*)", said)
        named += re.findall(r"warning: (.*) is damaged; what it said of", said)
        for path in (Path(each) for line in named for each in line.split(", ")):
            assert path in self._damaged, self._story(f"{path} is as it was", said)
            self.figures.messages["that name what is not made anew"] += 1
            self._unneeded.add(str(path.relative_to(self.run)))
        lost = re.findall(r"no state is older than (.*), which is removed and not made again", said)
        lost += re.findall(r"warning: (.*) were removed since, and are not made again", said)
        for name in (name for line in lost for name in line.split(", ")):
            assert self.run / name in self._damaged, self._story(f"{name} is as it was", said)
            self.figures.messages["that name a checkpoint that is older than every state"] += 1
            self._unneeded |= {name, "run.json"}

    def _heed(self, way: str, attempt: Attempt) -> int:
        """Do what a message says; returns the step to go on with."""
        said = attempt.said
        message = said[said.rfind("error: ") :]
        assert attempt.code == 2, self._story("it crashed", said)
        assert said.count("error: ") == 1, self._story("it is not one message", said)
        assert "Traceback" not in said, self._story("there is a traceback", said)
        named = self._named(message)
        assert named, self._story("the message names nothing that was damaged", said)
        self.figures.messages[named] += 1
        self.history.append("  " + message)
        do = message.partition("what to do: ")[2]
        if "cache verify --drop" in do:
            assert maintain(["verify", "--drop", "--cache_path", str(self.store)]) == 0
        if "remove it" in do:
            Path(re.findall(r"where: (.*)", message)[0]).unlink()
        again = next((step for words, step in _AGAIN if words in do), None)
        assert again is not None, self._story("nobody knows what to do", said)
        return WAYS[way].index(again) if again in WAYS[way] else 0

    def _named(self, message: str) -> str:
        """Which of the damaged things a message names: a file, or the folder that lacks it."""
        for path in self._damaged:
            if str(path) in message:
                return "that name the file"
        for path in self._damaged:
            if self.store in path.parents and str(self.store) in message:
                return "that name the store"
            if not path.exists() and str(path.parent) in message:
                return "that name the folder of a file that is gone"
        return ""

    def _compare(self, way: str) -> None:
        """Fail unless the result is that of the undisturbed run, at the latest after all steps were
        done again: what was damaged when its step was done, no other step may have read."""
        differs = self._differing()
        if differs and all(self.run / name in self._damaged for name in differs):
            self.history.append(f"{sorted(differs)} differ: again from the start")
            self._complete(way, 0, quietly=True)
            differs = self._differing()
        differs -= self._unneeded
        assert not differs, self._story(f"these differ: {sorted(differs)}", "")
        left = [
            str(path) for path in self._files().get("leftovers", []) if self.run in path.parents
        ]
        assert not left, self._story(f"left behind: {left}", "")
        if any(name.endswith(".safetensors") for name in self._unneeded):
            shutil.rmtree(self.run)  # it lacks a checkpoint from here on
        self._keep_damage(lambda path: True)
        self._unneeded = set()
        self.history = []
        self.figures.compared += 1

    def _differing(self) -> set[str]:
        """The files whose content is not that of the undisturbed run."""
        found = result(self.run)
        names = {*found, *self._wanted}
        return {n for n in names if found.get(n) != self._wanted.get(n)}

    def _story(self, what: str, said: str) -> str:
        return "\n".join([what, *self.history, said])


def soak(tiny_qwen: Path, folder: Path, kills: int, seed: int) -> Figures:
    """So many kills, and what came of them."""
    data = write_images(folder / "data", 12)
    values = {**lora_values(tiny_qwen, data, folder), "num_epochs": 4, "state_steps": 2}
    values |= {"sample_prompts": ["a picture"], "sample_num_inference_steps": 1}
    values |= {"height": 32, "width": 32}
    server = start_server()
    undisturbed = {way: Soak(server, folder / way, values, 0) for way in WAYS}
    lengths: dict[str, Attempt] = {}
    for way, one in undisturbed.items():
        lengths |= one.undisturbed(way)
    wanted, same = (result(one.run) for one in undisturbed.values())
    assert wanted == same
    assert len(wanted["metrics.csv"]) == 12
    tried = Soak(server, folder / "soak", values, seed, wanted, lengths)
    while tried.figures.kills.total() < kills:
        tried.round(min(6, kills - tried.figures.kills.total()))
    assert maintain(["verify", "--drop", "--cache_path", str(tried.store)]) == 0
    assert maintain(["gc", "--cache_path", str(tried.store)]) == 0
    return tried.figures


def test_what_was_killed_and_damaged_comes_to_the_same_result(
    tiny_qwen: Path, tmp_path: Path
) -> None:
    figures = soak(tiny_qwen, tmp_path, kills=1, seed=4)
    assert figures.kills.total() == 1
    assert figures.damage.total() >= 1


@pytest.mark.soak
def test_two_hundred_kills(tiny_qwen: Path, tmp_path: Path, show: Callable[[str], None]) -> None:
    """`SOAK_SEED` and `SOAK_KILLS` in the environment choose others."""
    seed = int(os.environ.get("SOAK_SEED", random.randrange(1 << 32)))
    kills, began = int(os.environ.get("SOAK_KILLS", "200")), time.monotonic()
    show(f"SOAK_SEED={seed}")
    figures = soak(tiny_qwen, tmp_path, kills, seed)
    show(f"{time.monotonic() - began:.0f} s with SOAK_SEED={seed}: {figures}")
    assert figures.kills.total() == kills
