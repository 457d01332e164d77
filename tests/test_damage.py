"""Damage on the disk, and numbers that are none: found where they are, and named."""

import os
import random
import shutil
import sqlite3
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from conftest import Values, train
from damage_support import DAMAGE
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
    assert train(config, tmp_path / "run", "--task", "sft:data_process")[0] == 0
    for shard in (tmp_path / "store" / "shards").iterdir():
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    capsys.readouterr()
    assert train(config, tmp_path / "run")[0] == 2
    error = capsys.readouterr().err
    assert "the store is damaged: the bytes of" in error
    assert "cache verify --drop --cache_path" in error
    assert maintain(["verify", "--drop", "--cache_path", str(tmp_path / "store")]) == 0
    assert train(config, tmp_path / "run")[0] == 0


def with_nan(path: Path, name: str) -> None:
    tensors = load_file(path)
    tensors[name].view(-1)[1] = torch.nan
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("folder", "tensor"),
    [
        ("vae", "decoder.conv_in.weight"),
        ("transformer", "img_in.weight"),
        ("text_encoder", None),
    ],
)
def test_weights_that_are_no_numbers_are_named(
    tiny_qwen: Path,
    values: Values,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    folder: str,
    tensor: str | None,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_qwen, model)
    (file,) = (model / folder).glob("*.safetensors")
    name = tensor or sorted(n for n in load_file(file) if "layers" in n)[0]
    with_nan(file, name)
    config = values(cache_path=str(tmp_path / "store"))
    moved = [str(path).replace(str(tiny_qwen), str(model)) for path in config["model_paths"]]
    assert train({**config, "model_paths": moved}, tmp_path / "run")[0] == 2
    error = capsys.readouterr().err
    assert f"the weights of '{name}' hold NaN or infinity" in error
    assert f"where: {file}" in error


def test_what_is_encoded_to_no_number_names_its_row_and_file(
    tiny_qwen: Path, values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where a VAE leaves the range of its type: here with weights near the end of float32."""
    model = tmp_path / "model"
    shutil.copytree(tiny_qwen, model)
    (file,) = (model / "vae").glob("*.safetensors")
    tensors = load_file(file)
    tensors["quant_conv.weight"] = torch.full_like(tensors["quant_conv.weight"], 3e38)
    save_file(tensors, file)
    config = values(cache_path=str(tmp_path / "store"))
    moved = [str(path).replace(str(tiny_qwen), str(model)) for path in config["model_paths"]]
    assert train({**config, "model_paths": moved}, tmp_path / "run")[0] == 2
    error = capsys.readouterr().err
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
    assert train(config, tmp_path / "run", "--task", "sft:data_process")[0] == 0
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
    assert train(config, tmp_path / "run")[0] == 2
    assert f"what rows {row} are encoded to holds NaN" in capsys.readouterr().err


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


def facts_of(cache: FactCache, files: list[Path], asked: list[Path]) -> dict[str, Any]:
    def look(path: Path) -> dict[str, Any]:
        asked.append(path)
        return {"length": len(path.read_text())}

    return {p.name: facts["length"] for p, facts in cache.look_up("test", files, look).items()}


@settings(max_examples=EXAMPLES, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_damaged_cache_of_facts_is_made_anew(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    """Nothing wrong is believed, and nothing has to be removed by hand."""
    source = random.Random(seed)
    folder = tmp_path_factory.mktemp("facts")
    files = [folder / f"{n}.txt" for n in range(20)]
    for number, path in enumerate(files):
        path.write_text("x" * number)
    wanted = {path.name: number for number, path in enumerate(files)}
    database = folder / "facts.sqlite"
    with closing(FactCache(database)) as cache:
        assert facts_of(cache, files, []) == wanted
    database.write_bytes(source.choice(DAMAGE)(database.read_bytes(), source))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            with closing(FactCache(database)) as cache:
                assert facts_of(cache, files, []) == wanted
    asked: list[Path] = []
    with closing(FactCache(database)) as cache:
        assert facts_of(cache, files, asked) == wanted
    assert asked == []


def test_a_damaged_cache_is_put_aside_with_a_warning(tmp_path: Path) -> None:
    database = tmp_path / "facts.sqlite"
    database.write_bytes(b"this is no database at all" * 100)
    with pytest.warns(UserWarning, match="is damaged, and was put aside as facts.sqlite.damaged"):
        FactCache(database).close()
    assert (tmp_path / "facts.sqlite.damaged").read_bytes().startswith(b"this is no")
    assert sqlite3.connect(database).execute("SELECT count(*) FROM known").fetchone() == (0,)


def test_no_flipped_bit_of_what_says_the_columns_stops_a_run(tmp_path: Path) -> None:
    """The first page of the database holds its header, and the names and types of the columns."""
    source, database = random.Random(0), tmp_path / "facts.sqlite"
    files = [tmp_path / "a.txt", tmp_path / "bb.txt"]
    for path in files:
        path.write_text(path.name)
    with closing(FactCache(database)) as cache:
        wanted = facts_of(cache, files, [])
    whole = database.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place in [*range(100), *range(100, 4096, 11), *range(3700, 4096, 3)]:
            changed = bytearray(whole)
            changed[place] ^= 1 << source.randrange(8)
            database.write_bytes(changed)
            with closing(FactCache(database)) as cache:
                assert facts_of(cache, files, []) == wanted, place


def test_a_cache_that_cannot_be_written_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "facts.sqlite").mkdir()
    with pytest.raises(OutputError, match="cannot be used: unable to open"):
        FactCache(tmp_path / "facts.sqlite")
    damaged = tmp_path / "other.sqlite"
    damaged.write_bytes(b"this is no database at all" * 100)
    (tmp_path / "other.sqlite.damaged").mkdir()
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(OutputError, match=r"cannot be used: .*directory"),
    ):
        FactCache(damaged)
