"""Simulated nights of recipes with `retrain`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
from dagster_support import definitions_of

BY_ITSELF = {"dagster/from_automation_condition": "true"}
CRON = {"cron": "0 3 * * *"}


def short(key: dg.AssetKey) -> str:
    """The last part of an asset's key, such as `metadata`; `weights` for the assets of weights."""
    return "weights" if key.path[0] == "weights" else key.path[-1]


@dataclass
class Nights:
    """Simulates Dagster's daemon over days.

    Every half minute, each sensor evaluates the automation conditions of its assets. The requested
    assets are materialized before the next evaluation.

    Attributes:
        definitions: returns the definitions as they would be loaded now.
        now: the simulated time.
        failing: whether runs may fail.
        events: the events of the runs since the last call of `night`.
    """

    definitions: Callable[[], dg.Definitions]
    instance: dg.DagsterInstance
    now: datetime = datetime(2031, 3, 3, 11, tzinfo=UTC)
    failing: bool = False
    events: list[dg.DagsterEvent] = field(default_factory=list[dg.DagsterEvent])
    _cursors: dict[str, Any] = field(default_factory=dict[str, Any])

    def tick(self, run: bool = True) -> list[set[str]]:
        """Evaluate the conditions once.

        Args:
            run: whether the requested assets are materialized.

        Returns:
            The requested assets, a set for each run.
        """
        definitions = self.definitions()
        asked: list[set[dg.AssetKey]] = []
        for sensor in definitions.sensors or ():
            if not isinstance(sensor, dg.AutomationConditionSensorDefinition):
                continue
            found = dg.evaluate_automation_conditions(
                definitions,
                self.instance,
                asset_selection=sensor.asset_selection,
                evaluation_time=self.now,
                cursor=self._cursors.get(sensor.name),
            )
            self._cursors[sensor.name] = found.cursor
            keys = sensor.asset_selection.resolve(definitions.resolve_asset_graph())
            asked.append({key for key in keys if found.get_num_requested(key)})
        # After all evaluations: in a daemon, too, sensors do not see what others request.
        for keys in filter(None, asked):
            if run:
                self._run(definitions, keys)
        self.now += timedelta(seconds=30)
        return [{short(key) for key in keys} for keys in asked if keys]

    def _run(self, definitions: dg.Definitions, keys: set[dg.AssetKey]) -> None:
        job = definitions.resolve_implicit_global_asset_job_def()
        result = job.execute_in_process(
            instance=self.instance,
            asset_selection=list(keys),
            tags=BY_ITSELF,
            raise_on_error=False,
        )
        assert result.success or self.failing, result.get_step_failure_events()
        self.events += result.all_events

    def ticks(self, count: int = 2, run: bool = True) -> list[set[str]]:
        """Tick until nothing was requested for `count` ticks; returns all that was requested."""
        asked: list[set[str]] = []
        quiet = 0
        while quiet < count:
            found = self.tick(run)
            quiet = 0 if found else quiet + 1
            asked += found
        return asked

    def noon(self) -> list[set[str]]:
        """What is requested in the middle of the day."""
        self.now = self.now.replace(hour=12, minute=0, second=0)
        return self.ticks()

    def night(self) -> list[set[str]]:
        """What is requested in the next night, in order."""
        self.events.clear()
        # `CRON` ticks at 3:00; begin just before it.
        if self.now.hour >= 3:
            self.now += timedelta(days=1)
        self.now = self.now.replace(hour=2, minute=59, second=40)
        assert self.tick() == [], "before the time of the cron"
        return self.ticks()

    def facts(self, kind: str) -> Mapping[str, Any]:
        """The metadata of the one materialization of an asset in the night, by its `short` name."""
        (found,) = [
            event.step_materialization_data.materialization
            for event in self.events
            if event.event_type == dg.DagsterEventType.ASSET_MATERIALIZATION
            and short(event.step_materialization_data.materialization.asset_key) == kind
        ]
        return {name: value.value for name, value in found.metadata.items()}


def nights_of(folder: Path, instance: dg.DagsterInstance) -> Nights:
    """The nights of a folder of recipes. The recipes are read again before each tick."""
    return Nights(lambda: definitions_of(folder), instance)


@dataclass
class Stubs:
    """Stubs for the assets of a folder of recipes: same keys, edges, code versions and conditions.

    A stub makes only a data version, which depends on its code version and on the data versions
    upstream.

    Attributes:
        files, rows: the data versions of `data` and of `metadata`, to be changed by tests.
        fails: the assets that fail, by `short` name or by whole key.
    """

    folder: Path
    files: int = 0
    rows: int = 0
    fails: set[str] = field(default_factory=set[str])
    _loaded: dict[tuple[str, ...], dg.Definitions] = field(
        default_factory=dict[tuple[str, ...], dg.Definitions]
    )
    _made: dict[dg.AssetKey, str] = field(default_factory=dict[dg.AssetKey, str])

    def definitions(self) -> dg.Definitions:
        """The definitions as they would be loaded now."""
        # Definitions are loaded again only after a recipe was edited.
        texts = tuple(path.read_text() for path in sorted(self.folder.iterdir()))
        if texts not in self._loaded:
            self._loaded = {texts: self._load()}
        return self._loaded[texts]

    def _load(self) -> dg.Definitions:
        real = definitions_of(self.folder)
        graph = real.resolve_asset_graph()
        assets = [self._asset(graph.get(key)) for key in graph.get_all_asset_keys()]
        return dg.Definitions(assets, sensors=real.sensors)

    def _asset(self, node: Any) -> dg.AssetsDefinition:
        key: dg.AssetKey = node.key

        @dg.asset(
            key=key,
            deps=list(node.parent_keys),
            group_name=node.group_name,
            code_version=node.code_version,
            automation_condition=node.automation_condition,
        )
        def stub() -> dg.MaterializeResult:
            if {short(key), key.to_user_string()} & self.fails:
                raise dg.Failure("on purpose", allow_retries=False)
            own = {"data": self.files, "metadata": self.rows}.get(short(key))
            parents = [self._made.get(parent) for parent in sorted(node.parent_keys)]
            made = str(own) if own is not None else f"{node.code_version} {parents}"
            # The same inputs give the same data version, as with the real assets.
            self._made[key] = str(hash(made))
            return dg.MaterializeResult(data_version=dg.DataVersion(self._made[key]))

        return stub
