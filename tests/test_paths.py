"""A path is the name of a file or folder, whatever characters it has."""

import ast
import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from conftest import ROOT, Values, make_config, record_of, train, train_to_end

from assets.losses import hardest_facts
from diffsynth_dagster.cache.layout import SAMPLES_FOLDER
from diffsynth_dagster.cache.manifest import read_manifest
from diffsynth_dagster.cache.split import first_half, second_half
from diffsynth_dagster.cache.store import Store
from diffsynth_dagster.cache.upkeep import statistics, verify
from diffsynth_dagster.config.entries import ModelEntry
from diffsynth_dagster.data import scan
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.table.read import read_table
from diffsynth_dagster.errors import MetadataError, WeightsError
from diffsynth_dagster.files import write_whole
from diffsynth_dagster.own_names import is_own
from diffsynth_dagster.report.metrics import read_metrics
from diffsynth_dagster.run.up_to_date import why_train
from diffsynth_dagster.weights.hub import ModelHub, require_listed

ODD = "a [1] *? {b,c} #%20 row=7"
"""What others read as a pattern, a URL or a partition is in this name of a folder."""


def write_table(path: Path, prompt: str) -> Path:
    """A table of one row, in the format that the path names."""
    rows = [{"image": "a.png", "prompt": prompt}]
    frame = pl.DataFrame(rows)
    if path.suffix == ".parquet":
        write_whole(path, frame.write_parquet)
    elif path.suffix == ".csv":
        write_whole(path, frame.write_csv)
    else:
        text = json.dumps(rows if path.suffix == ".json" else rows[0])
        path.write_text(text + "\n", encoding="utf-8")
    return path


def prompts_of(path: Path) -> list[str]:
    inputs = [Input("image", "image"), Input("prompt", "text")]
    return read_table(path, "utf-8", inputs).rows["prompt"].to_list()


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
def test_a_table_is_the_one_that_is_named(kind: str, tmp_path: Path) -> None:
    for name, other in (("m[1]", "m1"), ("m*", "mm"), ("m?", "m2"), ("m[", "m3"), ("{a,b}", "a")):
        write_table(tmp_path / f"{other}.{kind}", "another")
        named = tmp_path / f"{name}.{kind}"
        with pytest.raises(MetadataError, match="does not exist"):
            prompts_of(named)
        assert prompts_of(write_table(named, name)) == [name]
        named.unlink()


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
def test_a_relative_path_is_no_home_and_no_address(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("~", "file:", "s3:", "$HOME"):
        Path(folder).mkdir(exist_ok=True)
        assert prompts_of(write_table(Path(folder, f"t.{kind}"), folder)) == [folder]


def test_several_files_and_their_notes_are_those_that_are_named(tmp_path: Path) -> None:
    folder = tmp_path / ODD
    folder.mkdir()
    for name, value in (("m[1]", 1), ("m1", 2), ("mm", 3)):
        pl.DataFrame({"a": [value]}).write_parquet(folder / f"{name}.parquet", metadata={"n": name})
    named = [folder / "m[1].parquet", folder / "mm.parquet"]
    for schema in (None, {"a": pl.Int64}):
        assert scan.scan_parquet(named, schema).collect().to_dict(as_series=False) == {"a": [1, 3]}
    assert scan.read_parquet(named[0]).to_dict(as_series=False) == {"a": [1]}
    assert scan.read_notes(named[0])["n"] == "m[1]"


def test_brackets_in_the_model_list_are_no_pattern(tmp_path: Path) -> None:
    hub = ModelHub(tmp_path, skip_download=True)
    folder = tmp_path / "x[1]"
    folder.mkdir()
    for path in (tmp_path / "m1.safetensors", folder / "b.safetensors", folder / "a.safetensors"):
        path.touch()

    def files(text: str) -> list[Path]:
        return hub.files(ModelEntry("model_paths", paths=(text,)))

    with pytest.raises(WeightsError, match="does not exist"):
        files(str(tmp_path / "m[1].safetensors"))
    both = [folder / "a.safetensors", folder / "b.safetensors"]
    assert files(str(folder / "*.safetensors")) == files(str(folder)) == both
    there = ModelEntry("model_paths", paths=(str(folder / "?.safetensors"),))
    require_listed([there])
    one = ModelEntry("lora_checkpoint", paths=(str(tmp_path / "m?.safetensors"),))
    with pytest.raises(WeightsError, match="lora_checkpoint"):
        require_listed([there, one])


def test_a_training_in_folders_of_such_names(
    values: Values, pictures: Path, tiny_qwen: Path, tmp_path: Path
) -> None:
    place = tmp_path / ODD
    data, model = place / "data[1]", place / "model?"
    shutil.copytree(pictures, data)
    shutil.copytree(tiny_qwen, model)
    table = data / "t[1].csv"
    (data / "metadata.csv").rename(table)
    (data / "t1.csv").write_text("image,prompt\nnone.png,another table\n")
    given = values(
        dataset_base_path=str(data),
        dataset_metadata_path=str(table),
        tokenizer_path=str(model / "tokenizer"),
        model_paths=[p.replace(str(tiny_qwen), str(model)) for p in values()["model_paths"]],
        cache_path=str(place / "c[1]"),
        validation_split=2,
        keep_best=True,
        state_steps=1,
        sample_prompts=["a picture"],
        sample_num_inference_steps=1,
        height=32,
        width=32,
    )
    run = train_to_end(given, place / "o[1]")
    assert train({**given, "num_epochs": 2}, run)[0] == 0, "it goes on from its state"
    record = record_of(run)
    assert {"epoch-0.safetensors", "epoch-1.safetensors"} < {*record.checkpoints}
    left = [str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()]
    assert [name for name in left if not is_own(name)] == [], "a new output: see `own_names`"
    store = Store(place / "c[1]")
    assert not verify(store).damaged
    assert [use.folder for use in statistics(store).uses] == [run, run / SAMPLES_FOLDER]

    # Dagster reads the same.
    config = make_config({**given, "num_epochs": 2, "output_path": str(run)})
    assert Path(first_half(config).dataset_metadata_path or "") == run / "metadata.parquet"
    hub = ModelHub(tmp_path, skip_download=True)
    assert why_train(second_half(config), hub, processes=None) is None
    assert read_metrics(run).steps.height > 0
    assert "hardest_samples" in hardest_facts(config, [])
    assert read_manifest(run).rows.collect().height == 8


READS = ("scan_", "read_")
NO_FILES = ("read_clipboard", "read_database", "read_database_uri")


def unguarded(source: str, where: str) -> list[str]:
    """Where Python code reads a file with Polars itself: the calls, and the names it imports."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [node.attr] if node.value.id in ("pl", "polars") else []
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("polars"):
            names = [alias.name for alias in node.names]
        else:
            continue
        reads = [n for n in names if n.startswith(READS) and n not in NO_FILES]
        found += [f"{where}:{node.lineno}: {name}" for name in reads]
    return found


def test_polars_reads_files_in_one_module_alone() -> None:
    """Any other call could take a path for a pattern: use `diffsynth_dagster.data.scan`."""
    code = "import polars as pl\npl.scan_parquet(p)\nx = pl.read_csv\nfrom polars import scan_ipc\n"
    found = {each.rpartition(" ")[2] for each in unguarded(code, "")}
    assert found == {"scan_parquet", "read_csv", "scan_ipc"}
    folders = ("diffsynth_dagster", "assets", "jobs", "resources", "recipes", "benchmarks", "docs")
    sources = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(sources) > 100
    own = Path(scan.__file__)
    assert unguarded(own.read_text(encoding="utf-8"), ""), "the module itself does"
    others = {path: path.read_text(encoding="utf-8") for path in sources if path != own}
    read = {path: text for path, text in others.items() if "polars" in text}
    assert [hit for path, text in read.items() for hit in unguarded(text, str(path))] == []
