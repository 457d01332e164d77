"""A training that is not gone on with lies whole in `older/`, and nothing of it beside the next one."""

import errno
import json
import os
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import Values, keys_of, make_config, record_of, train_to_end, write_images
from test_resume import after, never, refusal, stop_after

from diffsynth_dagster.cache.store import Store
from diffsynth_dagster.cache.upkeep import collect, used_keys
from diffsynth_dagster.errors import OutputError
from diffsynth_dagster.export import export_folder
from diffsynth_dagster.files import remove_leftovers
from diffsynth_dagster.older import keep_tables, older_runs
from diffsynth_dagster.own_names import is_older, is_own
from diffsynth_dagster.run.earlier import drop_older, finish_moving
from diffsynth_dagster.run.folder import owned
from diffsynth_dagster.run.record import FILE_NAME, RunFile, RunRecord, read_record
from diffsynth_dagster.train import run as run_training
from diffsynth_dagster.training.resume import make_ready
from diffsynth_dagster.weights.hub import ModelHub

MINE = ["step-3-mine.safetensors", "notes.txt", "samples/cat.png", "state/mine/x", "older/mine/x"]
OF_A_TRAINING = [
    *("epoch-0.safetensors", "step-7.safetensors", "samples/step-1.png", "metrics.csv"),
    *("held_out.csv", "rows.parquet", "sample_losses.parquet"),
    *("state/step-1/state.json", "state/step-2/state.json"),
    *("exports/diffusers/dit/x.safetensors", "exports/kohya/y.safetensors"),
    *("exports/authors/dit/x.safetensors", "exports/comfyui/y.safetensors"),
    *("exports/README.md", "exports/loss.svg", "report.html"),
]
TABLES = ["metadata.parquet", "samples.parquet", "held_out/samples.parquet", "rejected.csv"]
ENDED = 1_700_000_000
CHANGES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "shutil.copyfile")
"""What Python tells before it does it."""


def contents(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


def write(folder: Path, names: list[str], text: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}: {name}")


def make_run(folder: Path, record: str = "whole", finished: bool = True) -> Path:
    """A run folder with a training, files of the user's, and the tables of the next data set."""
    write(folder, [*OF_A_TRAINING, *TABLES, "config.yaml"], "first")
    write(folder, MINE, "mine")
    known = RunRecord("i", "qwen_image", ["dit"], {}, 1, "s", "c", None)
    facts = {
        "checkpoints": dict.fromkeys(["epoch-0.safetensors"], "d"),
        "writing": ["step-7.safetensors"],
        "pictures": {"a": "step-1.png", "b": "cat.png"},
        "finished": finished,
    }
    RunFile(folder, RunRecord(**{**asdict(known), **facts}), writes=True).begin(total_steps=4)
    keep_tables(folder, folder)
    for name in TABLES:
        (folder / name).unlink()
    write(folder, TABLES, "second")
    if record == "damaged":
        (folder / FILE_NAME).write_text("{")
    if record == "gone":
        (folder / FILE_NAME).unlink()
    for name in (FILE_NAME, "metrics.csv"):
        if (folder / name).exists():
            os.utime(folder / name, (ENDED, ENDED))
    return folder


def split_of(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """What lies in the one older training, and what beside it."""
    (older,) = older_runs(folder)
    start = f"older/{older.name}/"
    everything = contents(folder)
    moved = {n.removeprefix(start): t for n, t in everything.items() if n.startswith(start)}
    return moved, {n: t for n, t in everything.items() if not n.startswith(start)}


@pytest.mark.parametrize("record", ["whole", "damaged", "gone"])
def test_all_of_a_training_and_nothing_else_is_moved(record: str, tmp_path: Path) -> None:
    run, warnings = make_run(tmp_path / "run", record), list[str]()
    before = contents(run)
    make_ready(run, None, warnings.append)
    moved, beside = split_of(run)
    # By the names alone, a checkpoint of the user's looks like one.
    looks_alike = [] if record == "whole" else ["step-3-mine.safetensors"]
    own = [*OF_A_TRAINING, "config.yaml", *([] if record == "gone" else [FILE_NAME]), *looks_alike]
    assert moved == {n: before[n] for n in own} | {n: f"first: {n}" for n in TABLES}
    kept = [*TABLES, "config.yaml", *(name for name in MINE if name not in looks_alike)]
    assert beside == {name: before[name] for name in kept}
    (older,) = older_runs(run)
    assert re.fullmatch(r"2023-11-1\dT\d\d-\d\d-20", older.name)
    (line,) = warnings
    assert line.endswith(f" is now in {older}")
    assert ("whose run.json is damaged or gone" in line) is (record != "whole")
    assert not (run / "exports").exists()
    make_ready(run, None, warnings.append)  # once more: there is nothing to move
    assert split_of(run) == (moved, beside)
    assert len(warnings) == 1


def killed(run: Path, touch: int) -> bool:
    """Whether a process that moves a training dies, just before it changes a folder for the n-th time."""
    process = os.fork()
    if process == 0:
        left = touch

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event in CHANGES and str(arguments[0]).startswith(str(run)):
                left -= 1
                if left < 0:
                    os._exit(9)

        sys.addaudithook(hook)
        try:
            make_ready(run, None, lambda text: None)
        finally:
            os._exit(0)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status) == 9


@pytest.mark.parametrize(
    ("record", "every"),
    [
        pytest.param("whole", 1, marks=pytest.mark.soak),
        ("whole", 4),
        ("damaged", 4),
        ("gone", 5),
    ],
)
def test_a_move_that_is_killed_is_finished_by_the_next_owner(
    record: str, every: int, tmp_path: Path
) -> None:
    begun = make_run(tmp_path / "begun", record)
    make_ready(shutil.copytree(begun, tmp_path / "whole"), None, lambda text: None)
    expected = split_of(tmp_path / "whole")
    touch, died_within = 0, 0
    while killed(run := shutil.copytree(begun, tmp_path / f"{touch}"), touch):
        with owned(run, "a test"):  # which removes what killed writers left
            was_moving, warnings = (run / ".older").exists(), list[str]()
            died_within += was_moving
            finish_moving(run, warnings.append)
            assert len(warnings) == was_moving
            assert not (run / ".older").exists()
            make_ready(run, None, warnings.append)
            (run / ".owner.json").unlink()
        (run / ".lock").unlink()
        assert split_of(run) == expected, touch
        shutil.rmtree(run)
        touch += every
    assert touch > 20
    assert died_within > 20 // every


def test_each_has_a_name_of_its_own_and_the_oldest_go_first(tmp_path: Path) -> None:
    for _ in range(11):
        make_ready(make_run(tmp_path), None, lambda text: None)
    names = [path.name for path in older_runs(tmp_path)]
    first = names[0]
    assert names == [first, *(f"{first}-{number}" for number in range(2, 12))]
    assert all(is_older(f"older/{name}/epoch-0.safetensors") for name in names)
    assert not is_own("older/mine/x")
    assert not is_own(f"older/{first}/notes.txt")

    warnings = list[str]()
    drop_older(tmp_path, None, warnings.append)
    assert len(older_runs(tmp_path)) == 11
    with owned(older_runs(tmp_path)[1], "going on with it"):
        drop_older(tmp_path, 8, warnings.append)
    assert [path.name for path in older_runs(tmp_path)] == [names[1], *names[3:]]
    assert [re.sub(r".*/", "", line)[:40].split(" ")[:3] for line in warnings] == [
        [names[0], "was", "removed:"],
        [names[1], "stays,", "though"],
        [names[2], "was", "removed:"],
    ]
    assert "in use: going on with it by process" in warnings[1]
    remove_leftovers(tmp_path / "older")
    assert (tmp_path / "older" / "mine" / "x").exists()


def test_what_came_to_no_checkpoint_and_no_state_is_removed(tmp_path: Path) -> None:
    """Or each try of a training that fails soon would be kept."""
    run, warnings = make_run(tmp_path / "run", finished=False), list[str]()
    for name in ("epoch-0.safetensors", "step-7.safetensors"):
        (run / name).unlink()
    shutil.rmtree(run / "exports")
    for name in ("step-1", "step-2"):
        shutil.rmtree(run / "state" / name)
    make_ready(run, None, warnings.append)
    assert warnings == []
    assert older_runs(run) == []
    left = {name for name in contents(run) if not name.startswith(".tables")}
    assert left == {*MINE, *TABLES, "config.yaml", FILE_NAME}  # the last two are replaced


def test_checkpoints_without_a_state_are_moved_too(tmp_path: Path) -> None:
    run, warnings = make_run(tmp_path / "run", finished=False), list[str]()
    shutil.rmtree(run / "state")
    (run / "metrics.csv").write_text("step,loss\n1,0.5\n2,0.5\n")
    make_ready(run, None, warnings.append)
    assert re.search(r"an unfinished training of .* \(step 2 of 4; without a state\)", warnings[0])
    assert (older_runs(run)[0] / "epoch-0.safetensors").exists()


def test_tables_are_kept_where_the_file_system_has_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    make_ready(run := make_run(tmp_path / "run"), None, lambda text: None)
    moved, beside = split_of(run)
    for name in TABLES:
        assert (moved[name], beside[name]) == (f"first: {name}", f"second: {name}")


def test_what_cannot_be_moved_is_one_message(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    shutil.rmtree(run / "older")
    (run / "older").write_text("a file of the user's")
    with pytest.raises(OutputError, match="cannot be moved to older/") as raised:
        make_ready(run, None, lambda text: None)
    assert raised.value.where == str(run)
    (run / "older").unlink()
    finish_moving(run, lambda text: None)
    assert len(older_runs(run)) == 1


def own_files(run: Path) -> dict[str, bytes]:
    """What a training leaves for its user, and its tables; without its older ones."""
    paths = [path for path in run.rglob("*") if path.is_file()]
    named = {path.relative_to(run).as_posix(): path for path in paths}
    return {
        name: path.read_bytes()
        for name, path in named.items()
        if not name.startswith((".", "older/")) and name != "config.yaml"
    }


def test_two_trainings_in_one_folder(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first is finished, with exports, samples and held-out samples; the second is on other data."""
    more = {"sample_prompts": ["a picture"], "sample_num_inference_steps": 1}
    size = {"height": 32, "width": 32, "cache_path": str(tmp_path / "cache")}
    first = values(**more, **size, validation_split=2)
    run = tmp_path / "run"
    train_to_end(first, run, exports=True)
    (run / "notes.txt").write_text("mine")
    before, config_before = own_files(run), (run / "config.yaml").read_bytes()
    del before["notes.txt"]
    keys = keys_of(run)

    data = write_images(tmp_path / "others", 5)
    of_others = {"dataset_base_path": str(data), "dataset_metadata_path": f"{data}/metadata.csv"}
    second = values(**size, **of_others)
    train_to_end(second, tmp_path / "alone")
    capsys.readouterr()
    train_to_end(second, run)

    (older,) = older_runs(run)
    text = capsys.readouterr().err
    assert "changed since the training before: " in text
    assert "the samples" in text
    assert re.search(rf"warning: the training of [\d-]+ [\d:]+ is now in {older}\n", text)
    assert own_files(older) == before
    assert (older / "config.yaml").read_bytes() == config_before
    record = record_of(older)
    assert record.finished
    assert keys_of(older) == keys
    # The second lies as it does alone.
    left = [str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()]
    alone = [str(p.relative_to(tmp_path / "alone")) for p in (tmp_path / "alone").rglob("*")]
    beside = {name for name in left if not is_older(name)}
    assert beside == {n for n in alone if (tmp_path / "alone" / n).is_file()} | {"notes.txt"}
    assert [name for name in left if not is_own(name)] == ["notes.txt"]
    for name in read_record(run).checkpoints:  # type: ignore[union-attr]
        assert (run / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()

    # A clean-up of the store spares what the first was encoded to: it can be exported, and gone on with.
    store = Store(tmp_path / "cache")
    assert {run, older} <= used_keys(store).keys()
    collect(store)
    again = make_config({**first, "output_path": str(older)})
    shutil.rmtree(older / "exports")
    assert export_folder(again, ModelHub(tmp_path, skip_download=True)).problems == []
    assert own_files(older) == before
    longer = run_training(make_config({**first, "output_path": str(older), "num_epochs": 2}), never)
    assert longer is not None
    assert longer.resumed_from == [record.steps]


def test_an_unfinished_training_is_moved_where_that_is_asked_for(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    config = values(output_path=str(run), num_epochs=3)
    stop_after(config, 4)
    other = {**config, "learning_rate": 1e-4, "num_epochs": 1}
    before = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    assert "resume: never, which moves what is there to older/" in refusal(other)
    assert {path: path.read_bytes() for path in before} == before
    assert older_runs(run) == []
    assert run_training(make_config({**other, "resume": "never"}), never) is not None
    (first,) = older_runs(run)
    words = r"warning: an unfinished training of .* \(step 4 of 6; the newest state is that after step 4\)"
    assert re.search(rf"{words} is now in {first}", capsys.readouterr().err)
    assert len(before) == 4  # two epochs with their states
    for path, content in before.items():
        assert (first / path.relative_to(run)).read_bytes() == content

    # The finished one goes by itself, and the oldest with it.
    stop = after(run, 10)
    third = run_training(make_config({**other, "seed": 1, "runs_keep": 1}), stop)
    assert third is not None
    (second,) = older_runs(run)
    assert second != first
    assert f"{first} was removed: runs_keep is 1" in capsys.readouterr().err
    record = json.loads((second / FILE_NAME).read_text())
    assert record["finished"]

    # Nothing differs: it ends at once, and nothing is moved.
    assert run_training(make_config({**other, "seed": 1}), never) is not None
    assert older_runs(run) == [second]
    assert "the run folder holds the state of another training" in refusal(
        {**other, "resume": "must"}
    )
    assert older_runs(run) == [second]
