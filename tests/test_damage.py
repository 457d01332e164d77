"""Damage on the disk, and numbers that are none: found where they are, and named."""

import os
import random
import shutil
import sqlite3
import warnings
from collections.abc import Callable, Iterable
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from conftest import Values, model_files, train, train_to_end, why_refused
from damage_support import DAMAGE, flipped
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from diffsynth_dagster.cache.__main__ import main as maintain
from diffsynth_dagster.cache.store import Store
from diffsynth_dagster.cache.upkeep import verify
from diffsynth_dagster.errors import OutputError, StoreError
from diffsynth_dagster.facts import FactCache
from diffsynth_dagster.weights.load import is_finite

EXAMPLES = int(os.environ.get("DAMAGE_EXAMPLES", "60"))
"""Of each kind of damage."""
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of a few shards, and the note of a run folder."""
    made = Store(tmp_path_factory.mktemp("damage") / "store")
    for shard in range(3):
        with made.writer() as writer:
            for sample in range(4):
                noise = torch.randn(2, 8, generator=torch.Generator().manual_seed(sample))
                writer.add(f"{shard}{sample}", {"image": noise, "mask": noise > 0})
    made.add_user(made.path.parent / "run")
    return made.path


def contents(store: Store) -> dict[str, list[Any]]:
    """All that a training could read of a store."""
    index = store.index()
    read = {key: store.read(key) for key in index["key"].unique(maintain_order=True)}
    return {
        "users": list(store.users()),
        **{key: [read[key][name].tolist() for name in sorted(read[key])] for key in sorted(read)},
    }


@settings(max_examples=EXAMPLES, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_damage_to_a_store_is_found_and_dropped(
    store: Path, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    """Whatever happens to one file: what is read is what was written, or an error names the file;
    `verify` finds what reading trips over, and after `verify --drop` the rest is readable."""
    source = random.Random(seed)
    path = tmp_path_factory.mktemp("copy") / "store"
    shutil.copytree(store, path)
    whole = contents(Store(path))
    file = source.choice(sorted(p for p in path.rglob("*") if p.is_file() and p.name != "lock"))
    file.write_bytes(source.choice(DAMAGE)(file.read_bytes(), source))
    failed: StoreError | None = None
    try:
        read = contents(Store(path))
        assert read == {**whole, "users": read["users"]}  # a path may have another letter
    except StoreError as error:
        failed = error
    found = verify(Store(path), drop=True).damaged
    if failed is not None:
        assert found
        assert str(path) in str(failed)
        assert "cache verify --drop" in str(failed)
    left = contents(Store(path))
    assert left.items() <= {**whole, "users": left["users"]}.items()
    assert not verify(Store(path)).damaged


def test_a_flipped_byte_is_not_trained_on(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = values(cache_path=str(tmp_path / "store"))
    train_to_end(config, tmp_path / "run", "--task", "sft:data_process")
    for shard in (tmp_path / "store" / "shards").iterdir():
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    capsys.readouterr()
    error = why_refused(config, tmp_path / "run")
    assert "the store is damaged: the bytes of" in error
    assert "cache verify --drop --cache_path" in error
    assert maintain(["verify", "--drop", "--cache_path", str(tmp_path / "store")]) == 0
    train_to_end(config, tmp_path / "run")


@pytest.fixture
def failed(
    tiny_qwen: Path, values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, Callable[[Tensors], None]], tuple[Path, str]]:
    """Train with other weights in a folder of the model; returns their file and the message."""

    def attempt(folder: str, change: Callable[[Tensors], None]) -> tuple[Path, str]:
        model = Path(shutil.copytree(tiny_qwen, tmp_path / "model"))
        (file,) = (model / folder).glob("*.safetensors")
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        config = values(cache_path=str(tmp_path / "store"), model_paths=model_files(model))
        assert train(config, tmp_path / "run")[0] == 2
        return file, capsys.readouterr().err

    return attempt


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("vae", "decoder.conv_in.weight"),
        ("transformer", "img_in.weight"),
        ("text_encoder", "model.layers.0.input_layernorm.weight"),
    ],
)
def test_weights_that_are_no_numbers_are_named(failed: Any, folder: str, name: str) -> None:
    def with_nan(tensors: Tensors) -> None:
        tensors[name].view(-1)[1] = torch.nan

    file, error = failed(folder, with_nan)
    assert f"the weights of '{name}' hold NaN or infinity" in error
    assert f"where: {file}" in error


def test_what_is_encoded_to_no_number_names_its_row_and_file(failed: Any, tmp_path: Path) -> None:
    """As where a VAE leaves the range of its type: here with weights near the end of float32."""
    _, error = failed("vae", lambda tensors: tensors["quant_conv.weight"].fill_(3e38))
    assert "what 'image' makes of '" in error
    assert ".png' holds NaN or infinity" in error
    assert "where: row " in error
    assert "learning_rate" not in error
    store = Store(tmp_path / "store")
    assert store.index()["finite"].all()
    assert "prompt_embeds" in store.index()["output"]  # what was encoded before it is kept


def test_encoded_samples_with_nan_are_not_trained_on(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of a store that was filled before they were refused."""
    config = values(cache_path=str(tmp_path / "store"))
    train_to_end(config, tmp_path / "run", "--task", "sft:data_process")
    store = Store(tmp_path / "store")
    index = store.index()
    outputs = {key: store.read(key) for key in index["key"].unique()}
    shutil.rmtree(store.path / "index")
    row, key = (
        pl.read_parquet(tmp_path / "run" / "samples.parquet").select("row", "key:image").row(3)
    )
    outputs[key] = {name: tensor * torch.nan for name, tensor in outputs[key].items()}
    with store.writer() as writer:
        for key, tensors in outputs.items():
            writer.add(key, tensors)
    capsys.readouterr()
    assert f"what rows {row} are encoded to holds NaN" in why_refused(config, tmp_path / "run")


def test_numbers_are_found() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        tensor = torch.ones(1000).to(dtype)
        assert is_finite(tensor)
        for place in (0, 500, 993, 999):  # where vectors of the processor start and end too
            changed = tensor.clone()
            changed[place] = torch.tensor(torch.nan).to(dtype)
            assert not is_finite(changed)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert not is_finite(torch.tensor([1.0, torch.inf, -torch.inf]).to(dtype))
        assert is_finite(torch.full((1000,), torch.finfo(dtype).max, dtype=dtype))
    assert is_finite(torch.arange(5))
    assert is_finite(torch.ones(0))


@pytest.fixture
def texts(tmp_path: Path) -> dict[Path, int]:
    """Files and their lengths."""
    files = {tmp_path / f"{n}.txt": n for n in range(20)}
    for path, length in files.items():
        path.write_text("x" * length)
    return files


def length(path: Path) -> dict[str, int]:
    return {"length": path.stat().st_size}


def never(path: Path) -> dict[str, int]:
    raise AssertionError(f"{path.name} is looked at again")


def lengths(cache: FactCache, files: Iterable[Path], find_out: Any = length) -> dict[Path, int]:
    return {p: facts["length"] for p, facts in cache.look_up("test", files, find_out).items()}


@pytest.mark.filterwarnings("ignore:.*damaged")
def test_nothing_of_a_damaged_cache_of_facts_is_believed(
    tmp_path: Path, texts: dict[Path, int]
) -> None:
    """And it stops no run: also where the damage is in the first page, in the names of the columns.

    After two runs no file is looked at again, but where the only damage is in the index: SQLite does
    not notice all of that.
    """
    database, source = tmp_path / "facts.sqlite", random.Random(0)
    with FactCache(database) as cache:
        assert lengths(cache, texts) == texts
    with closing(sqlite3.connect(database)) as opened:
        query = "SELECT (rootpage - 1) * 4096 FROM sqlite_master WHERE type = 'index'"
        ((index,),) = opened.execute(query).fetchall()
    whole = database.read_bytes()
    assert len(whole) == index + 4096, "its last page"
    damaged = [source.choice(DAMAGE)(whole, source) for _ in range(EXAMPLES // 2)]
    damaged.append(whole.replace(b'{"length": 7}', b'{"length": 9}'))
    for start, end in ((0, 100), (3700, 4096)):
        for _ in range(EXAMPLES // 4):
            damaged.append(whole[:start] + flipped(whole[start:end], source) + whole[end:])
    for number, content in enumerate(damaged):
        database.write_bytes(content)
        in_index = len(content) == len(whole) and content[:index] == whole[:index]
        for find_out in (length, length, length if in_index else never):
            with FactCache(database) as cache:
                assert lengths(cache, texts, find_out) == texts, number


def test_a_damaged_cache_is_made_anew_with_a_warning(
    tmp_path: Path, texts: dict[Path, int]
) -> None:
    """Also where two processes have it open."""
    database = tmp_path / "facts.sqlite"
    with FactCache(database) as cache:
        lengths(cache, texts)
    with FactCache(database) as first, FactCache(database) as second:
        database.write_bytes(b"this is no database at all" * 500)
        with pytest.warns(UserWarning, match="is damaged, and is made anew"):
            assert lengths(first, texts) == texts
        assert lengths(second, texts, never) == texts
    with FactCache(database) as cache:
        assert lengths(cache, texts, never) == texts


def look_up_at_once(database: Path, files: list[Path], barrier: Any) -> None:
    """In a process of its own: what fails ends it with another exit code than 0."""
    warnings.simplefilter("ignore")
    barrier.wait(30)
    with FactCache(database) as cache:
        barrier.wait(30)
        assert lengths(cache, files) == {path: path.stat().st_size for path in files}


def test_a_damaged_cache_is_made_anew_once_by_several_processes(
    tmp_path: Path, texts: dict[Path, int]
) -> None:
    """What one of them writes into the new one is not removed by another."""
    database, files, many = tmp_path / "facts.sqlite", [*texts], get_context("fork")
    with FactCache(database) as cache:
        lengths(cache, files)
    first_page = database.read_bytes()[:4096]
    for damage in (b"no database" * 2000, first_page + b"x" * 8192) * 2:
        database.write_bytes(damage)
        barrier = many.Barrier(3)
        parts = (files[:7], files[7:14], files[14:])
        workers = [
            many.Process(target=look_up_at_once, args=(database, part, barrier)) for part in parts
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert [worker.exitcode for worker in workers] == [0, 0, 0]
        with FactCache(database) as cache:
            assert lengths(cache, files, never) == texts


def test_a_cache_that_cannot_be_written_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "facts.sqlite").mkdir()
    with pytest.raises(OutputError, match="cannot be used: unable to open"):
        FactCache(tmp_path / "facts.sqlite")
