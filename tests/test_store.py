"""The store: whole or not there, safe for several writers, and read by key alone."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pytest
import torch
from conftest import ROOT, Values, train_to_end, why_refused, write_images
from soak_support import start_server

from diffsynth_dagster.cache.__main__ import main as maintain
from diffsynth_dagster.cache.layout import LAYOUT_VERSION
from diffsynth_dagster.cache.manifest import Notes, write_manifest
from diffsynth_dagster.cache.shards import tensor_digest
from diffsynth_dagster.cache.store import Store
from diffsynth_dagster.cache.upkeep import collect, statistics, verify
from diffsynth_dagster.errors import StoreError
from diffsynth_dagster.files import hidden_beside, remove_leftovers, write_tensors, write_text


def fill(store: Store, keys: list[str]) -> None:
    with store.writer() as writer:
        for key in keys:
            writer.add(key, {"image": torch.full((2, 3), float(int(key))), "other": torch.ones(1)})


def test_what_was_written_is_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, ["1", "2"])
    assert store.missing(["1", "3", "2", "3"]).to_list() == ["3"]
    outputs = Store(tmp_path).read("2")
    assert outputs.keys() == {"image", "other"}
    assert torch.equal(outputs["image"], torch.full((2, 3), 2.0))
    row = store.index().filter((pl.col("key") == "1") & (pl.col("output") == "image"))
    assert row["digest"].to_list() == [tensor_digest(torch.ones(2, 3))]
    assert row["shape"].to_list() == [[2, 3]]
    assert row["finite"].to_list() == [True]


def test_an_unknown_key_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="sft:data_process"):
        Store(tmp_path).read("nothing")


def test_a_shard_without_its_index_is_not_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, ["1"])
    (index,) = (tmp_path / "index").glob("*.parquet")
    index.unlink()
    assert Store(tmp_path).missing(["1"]).to_list() == ["1"]


def test_an_error_while_encoding_keeps_what_was_encoded(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def encode() -> None:
        with store.writer() as writer:
            writer.add("1", {"image": torch.ones(1)})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        encode()
    assert Store(tmp_path).missing(["1", "2"]).to_list() == ["2"]
    assert len(list((tmp_path / "shards").iterdir())) == 1
    assert all(not path.name.startswith(".") for path in tmp_path.rglob("*"))


def write_forty(folder: Path) -> None:
    for i in range(40):
        with Store(folder).writer() as writer:
            writer.add(str(i), {"image": torch.full((100,), float(i))})


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    """They overlap in every key; each key is read whole afterwards."""
    server = start_server()
    processes = [server.Process(target=write_forty, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    store = Store(tmp_path)
    assert store.missing(map(str, range(40))).to_list() == []
    assert all(float(store.read(str(i))["image"].mean()) == i for i in range(40))


def test_nan_is_marked_in_the_index(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.writer() as writer:
        writer.add("1", {"image": torch.tensor([1.0, float("nan")])})
        writer.add("2", {"image": torch.tensor([1, 2])})
    assert store.index().sort("key")["finite"].to_list() == [False, True]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", "old")

    def fail(staged: Path) -> None:
        staged.write_text("half")
        raise KeyboardInterrupt

    from diffsynth_dagster.files import write_whole

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_equal_tensors_give_equal_bytes_in_any_process(tmp_path: Path) -> None:
    """safetensors orders the header's text entries at random; we do not."""
    metadata = dict.fromkeys("abcdefgh", "x")
    tensors = {"b": torch.ones(3), "a": torch.zeros(2)}
    files = [write_tensors(tmp_path / f"{i}.safetensors", tensors, metadata) for i in range(8)]
    assert len({file.read_bytes() for file in files}) == 1


@pytest.fixture
def encoded(values: Values, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """The parameters of a data set that was encoded into a store of its own, and the store."""
    config = values(cache_path=str(tmp_path / "store"))
    train_to_end(config, tmp_path / "a", "--task", "sft:data_process")
    return config, tmp_path / "store"


def test_verify_finds_a_changed_byte_and_drop_mends_it(
    encoded: tuple[dict[str, Any], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, store = encoded
    assert maintain(["verify", "--cache_path", str(store)]) == 0
    shard = sorted((store / "shards").iterdir())[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert maintain(["verify", "--cache_path", str(store)]) == 1
    assert "have changed" in capsys.readouterr().out
    assert maintain(["verify", "--drop", "--cache_path", str(store)]) == 0
    assert "the store lacks" in why_refused(config, tmp_path / "a", "--task", "sft:train")
    train_to_end(config, tmp_path / "a", "--task", "sft:data_process")
    assert maintain(["verify", "--cache_path", str(store)]) == 0
    train_to_end(config, tmp_path / "a", "--task", "sft:train")


def test_gc_drops_what_no_run_folder_uses(
    encoded: tuple[dict[str, Any], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, path = encoded
    small = {**config, "height": 16, "width": 16}
    train_to_end(small, tmp_path / "b", "--task", "sft:data_process")
    both = statistics(Store(path))
    assert both.keys == 8 + 8 + 8  # the prompts are shared, the images are not
    assert {use.folder.name: use.keys for use in both.uses} == {"a": 16, "b": 16}
    stray = path / "shards" / f"{'0' * 32}.safetensors"
    stray.write_bytes(b"left by a killed writer")
    hidden_beside(stray).write_bytes(b"half")
    shutil.rmtree(tmp_path / "a")
    assert maintain(["gc", "--cache_path", str(path)]) == 0
    after = statistics(Store(path))
    assert (after.keys, after.stray_files) == (16, 0)
    assert after.used_bytes == after.bytes
    assert maintain(["verify", "--cache_path", str(path)]) == 0
    train_to_end(small, tmp_path / "b", "--task", "sft:train")
    assert maintain(["stats", "--cache_path", str(path)]) == 0
    assert str(tmp_path / "b") in capsys.readouterr().out


def test_what_a_process_with_our_number_left_is_removed(tmp_path: Path) -> None:
    """In a container that is started anew, processes have the numbers of those before."""
    left, ours = hidden_beside(tmp_path / "a"), hidden_beside(tmp_path / "b")
    for path in (left, ours):
        path.write_bytes(b"half")
    began = psutil.Process().create_time()
    os.utime(left, (began - 60, began - 60))
    remove_leftovers(tmp_path)
    assert not left.exists()
    assert ours.exists()


def test_gc_of_a_moved_store_keeps_what_is_used(
    encoded: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    _, path = encoded
    moved = Store(path.rename(tmp_path / "moved"))
    assert collect(moved).removed_keys == 0
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(StoreError, match="none of the run folders"):
        collect(moved)
    assert statistics(moved).keys == 16


def one_used_of_ten(folder: Path) -> Store:
    """A store of ten keys in one shard, of which a run folder uses one."""
    store = Store(folder / "store")
    fill(store, [str(i) for i in range(10)])
    frame = pl.DataFrame({"sample": ["s"], "row": [1], "width": [1], "height": [1], "key:a": ["7"]})
    notes = Notes(str(folder / "store"), "f", "digest", 1, layout=LAYOUT_VERSION)
    write_manifest(frame.lazy(), notes, folder / "run" / "samples.parquet")
    store.add_user(folder / "run")
    return store


def test_gc_writes_a_shard_anew_when_little_of_it_is_used(tmp_path: Path) -> None:
    assert collect(one_used_of_ten(tmp_path)).removed_keys == 9
    fresh = Store(tmp_path / "store")
    assert float(fresh.read("7")["image"].mean()) == 7.0
    assert fresh.missing(["7", "8"]).to_list() == ["8"]
    assert not verify(fresh).damaged


def test_gc_writes_no_damage_anew(tmp_path: Path) -> None:
    store = one_used_of_ten(tmp_path)
    (shard,) = (tmp_path / "store" / "shards").iterdir()
    content = bytearray(shard.read_bytes())
    place = content.index(store.read("7")["image"].numpy().tobytes())
    content[place] ^= 1
    shard.write_bytes(content)
    with pytest.raises(StoreError, match="the bytes of 7…/image have changed"):
        collect(Store(tmp_path / "store"))
    assert shard.read_bytes() == content
    assert verify(Store(tmp_path / "store")).damaged


def test_gc_removes_nothing_while_it_is_not_known_what_is_used(tmp_path: Path) -> None:
    """The advice for a damaged note does not lead to a lost store."""
    store = one_used_of_ten(tmp_path)
    (note,) = store.notes
    note.write_text('{"run_folder": ')
    with pytest.raises(StoreError, match="cache verify --drop"):
        collect(store)
    assert list(verify(store, drop=True).damaged) == [note]
    with pytest.raises(StoreError, match="it is not known of every run folder"):
        collect(store)
    assert verify(store).damaged == {}
    store.add_user(tmp_path / "run")  # as its next training does
    assert collect(store).removed_keys == 9
    assert float(Store(tmp_path / "store").read("7")["image"].mean()) == 7.0


def test_gc_waits_for_no_one(encoded: tuple[dict[str, Any], Path]) -> None:
    _, path = encoded
    with Store(path).in_use(), Store(path).in_use(), pytest.raises(StoreError, match="in use"):
        collect(Store(path))
    collect(Store(path))


def test_maintenance_without_a_store_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert maintain(["stats", "--cache_path", str(tmp_path / "no")]) == 2
    assert "there is no store" in capsys.readouterr().err


def kill_until_done(config: dict[str, Any], folder: Path, kills: int, seed: int) -> int:
    """Encode a data set in processes that are killed at random moments; returns how many were."""
    recipe = folder / "recipe.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    recipe.write_text(json.dumps({**config, "task": "sft:data_process"}))
    # Small shards, so that kills fall between and into their writing.
    code = (
        "import sys, diffsynth_dagster.cache.shards as shards; shards.SHARD_BYTES = 50_000; "
        "from diffsynth_dagster.train import main; sys.exit(main(sys.argv[1:]))"
    )
    source, killed = random.Random(seed), 0
    while True:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "--recipe", str(recipe)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        if killed == kills:
            assert process.wait() == 0
            return killed
        # Imports take seconds: the moments lie between the first write and the end.
        try:
            wait_for_work(process, Path(config["cache_path"]))
            process.wait(timeout=source.uniform(0.0, 1.0))
            assert process.returncode == 0
            return killed
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
        assert not verify(Store(Path(config["cache_path"]))).damaged


def wait_for_work(process: "subprocess.Popen[bytes]", store: Path) -> None:
    """Wait until a process holds the store."""
    while process.poll() is None:
        try:
            with Store(store).in_use(alone=True):
                time.sleep(0.02)
        except StoreError:
            return


def check_kills(values: Values, tmp_path: Path, kills: int, count: int) -> None:
    data = write_images(tmp_path / "data", count)
    config = values(
        dataset_base_path=str(data),
        dataset_metadata_path=str(data / "metadata.csv"),
        batch_size=4,
        lora_target_modules=None,
    )
    alone = {**config, "cache_path": str(tmp_path / "s1"), "output_path": str(tmp_path / "a")}
    assert kill_until_done(alone, tmp_path / "a", 0, 0) == 0
    killed = {**config, "cache_path": str(tmp_path / "s2"), "output_path": str(tmp_path / "b")}
    assert kill_until_done(killed, tmp_path / "b", kills, 1) > 0
    columns = ["key", "output", "shape", "digest"]
    first, second = (
        Store(tmp_path / name).index().select(columns).sort("key") for name in ("s1", "s2")
    )
    assert first.equals(second)


@pytest.mark.soak  # `test_soak.py` kills encodings too
def test_killed_encoding_goes_on(values: Values, tmp_path: Path) -> None:
    check_kills(values, tmp_path, kills=2, count=100)


@pytest.mark.soak
def test_encoding_killed_at_twenty_moments(values: Values, tmp_path: Path) -> None:
    check_kills(values, tmp_path, kills=20, count=1500)
