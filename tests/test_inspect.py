"""Weight files say where they come from, in what they differ, and how they are made again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Values, lora_values, record_of, train, train_to_end, write_images
from safetensors.torch import load_file, save_file

from diffsynth_dagster.families import each_family
from diffsynth_dagster.inspect.__main__ import main
from diffsynth_dagster.run.record import FILE_NAME, read_record
from diffsynth_dagster.train import main as trainer
from diffsynth_dagster.weights.header import PROVENANCE_KEY, read_metadata
from diffsynth_dagster.weights.model_spec import model_spec

CHECKPOINT = "epoch-0.safetensors"
EXPORT = Path("exports", "diffusers", "pytorch_lora_weights.safetensors")
Said = Callable[..., str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Runs the command line; returns what it prints, and errors."""

    def inspect(*arguments: str | Path, code: int = 0) -> str:
        capsys.readouterr()
        assert main([str(a) for a in arguments]) == code
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    return inspect


@pytest.fixture(scope="module")
def run(shared_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a training with exports, which no test changes."""
    folder = train_to_end(shared_values, tmp_path_factory.mktemp("inspect") / "run", exports=True)
    return folder


def test_a_file_says_what_it_is(run: Path, said: Said) -> None:
    record = record_of(run)
    for name in (Path(CHECKPOINT), EXPORT):
        text = said(run / name)
        assert "qwen_image" in text
        assert "LoRA of rank 4, alpha 4 of dit" in text
        assert "2 of 2; the training is finished" in text
        assert "8 samples" in text
        assert f"torch {torch.__version__}" in text
        assert all(digest in text for digest in record.base.values())
        assert "title        qwen-image/lora" in text


def test_a_file_that_was_moved_is_told_by_its_header(run: Path, said: Said, tmp_path: Path) -> None:
    moved = Path(shutil.copy(run / CHECKPOINT, tmp_path / "mine.safetensors"))
    assert "run folder     not found" in said(moved)
    assert "give the run folder with --run" in said(moved, "--dataset", code=2)
    assert "changed since: nothing" in said(moved, "--dataset", "--run", run)
    other = tmp_path / "other"
    other.mkdir()
    assert "no training in the folder wrote the file" in said(moved, "--run", other, code=2)


def test_changed_bytes_are_noticed(run: Path, said: Said, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    data = bytearray((copy / CHECKPOINT).read_bytes())
    data[-1] ^= 1
    (copy / CHECKPOINT).write_bytes(data)
    assert "its bytes have changed" in said(copy / CHECKPOINT)
    assert "its bytes have changed" not in said(run / CHECKPOINT)


def test_a_file_of_another_tool(run: Path, said: Said, tmp_path: Path) -> None:
    tensors = load_file(run / CHECKPOINT)
    tensors = {n: t * 0 + 2 if n.endswith(".alpha") else t for n, t in tensors.items()}
    save_file(
        tensors, tmp_path / "foreign.safetensors", {"modelspec.trigger_phrase": "a\x1b[1mcat"}
    )
    text = said(tmp_path / "foreign.safetensors")
    assert "no training of this project wrote the file" in text
    assert "qwen_image: 4 layers of dit" in text
    assert "rank           4" in text
    assert "alpha          2\n" in text
    assert "comfyui" in text
    assert r"a\x1b[1mcat" in text
    error = said(tmp_path / "foreign.safetensors", "--dataset", code=2)
    assert "the file has no provenance" in error


@pytest.mark.parametrize("provenance", ["{", "5", '{"family": 3}', "[" * 9999])
def test_nonsense_in_the_header_is_a_message(said: Said, tmp_path: Path, provenance: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {PROVENANCE_KEY: provenance})
    error = said(tmp_path / "a.safetensors", code=2)
    assert "what the header says of where the file comes from cannot be read" in error


def test_rows_that_changed_since(
    tiny_qwen: Path, shared_cache: Path, said: Said, tmp_path: Path
) -> None:
    data = write_images(tmp_path / "data", 8)
    table = data / "metadata.csv"
    (data / "broken.png").write_bytes(b"no picture")
    table.write_text(table.read_text() + "broken.png,never trained on\n")
    values = {**lora_values(tiny_qwen, data, shared_cache), "max_rejected_fraction": 0.5}
    _, run = train(values, tmp_path / "run")
    before = said(run / CHECKPOINT, "--dataset")
    assert "rows: 9 (8 ok, 1 unreadable)" in before
    assert "trained on: rows 1-8" in before
    assert "changed since: nothing" in before
    lines = table.read_text().splitlines()
    lines[3] = '2.png,"a dog"'  # row 3
    del lines[6]  # row 6
    table.write_text("\n".join([*lines, "0.png,again"]) + "\n")
    (data / "3.png").unlink()
    shutil.copy(data / "1.png", data / "4.png")
    (data / "7.png").touch()
    text = said(run / CHECKPOINT, "--dataset")
    assert "row 3: prompt: 'picture number xx 2' → 'a dog'" in text
    assert f"row 4: image {data / '3.png'}: it is gone" in text
    assert f"row 5: image {data / '4.png'}: its content has changed" in text
    assert "no longer in the table, or named otherwise: rows 6\n" in text
    assert "in the table, and not trained on: rows 9 of now" in text
    assert len(text.splitlines()) == 10
    table.unlink()
    assert "the table cannot be compared" in said(run / CHECKPOINT, "--dataset")


def test_an_older_training_has_its_own_tables(values: Values, said: Said, tmp_path: Path) -> None:
    train(values(validation_split=2), tmp_path / "run")
    train_to_end(values(seed=1), tmp_path / "run", "--resume", "never")
    (older,) = (tmp_path / "run" / "older").iterdir()
    text = said(older / CHECKPOINT, "--dataset")
    assert f"as it was checked: {older}" in text
    record = record_of(older)
    assert record.samples == 6
    rows = text.split("trained on: rows ")[1].splitlines()[0]
    spans = [[int(n) for n in part.split("-")] for part in rows.split(", ")]
    assert sum(span[-1] - span[0] + 1 for span in spans) == 6


def test_two_files_differ_for_named_reasons(
    values: Values, pictures: Path, run: Path, said: Said, tmp_path: Path
) -> None:
    data = shutil.copytree(pictures, tmp_path / "data")
    table = data / "metadata.csv"
    lines = table.read_text().replace("picture number  0", "a cat").splitlines()
    table.write_text("\n".join([*lines[:7], *lines[8:], '1.png,"one more"']) + "\n")  # not row 7
    shutil.copy(data / "0.png", data / "2.png")
    model = shutil.copytree(Path(values()["model_paths"][2]).parents[1], tmp_path / "model")
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({n: t + 1e-3 for n, t in tensors.items()}, weights)
    overrides = {
        "dataset_base_path": str(data),
        "dataset_metadata_path": str(table),
        "seed": 7,
        "optimizer": "prodigy",
        "learning_rate": 1.0,
        "validation_split": 2,
        "batch_size": 2,
        "model_paths": [*values()["model_paths"][:2], str(weights)],
    }
    train_to_end(values(**overrides), tmp_path / "other")
    text = said("--diff", run / CHECKPOINT, tmp_path / "other" / CHECKPOINT)
    assert "tensors: " in text
    assert " of 12 differ" in text
    for expected in (
        "seed: 0 and 7",
        "optimizer: 'adamw' and 'prodigy'",
        "batch_size: 4 and 2",
        "step: 2 and 3",
        "row 1 of A, 1 of B: prompt: 'picture number  0' → 'a cat'",
        "row 3 of A, 3 of B: image '2.png' has another content",
        "rows of A alone: 7",
        "rows of B alone: 8",
    ):
        assert expected in text
    a, b = read_record(run), read_record(tmp_path / "other")
    assert a is not None
    assert b is not None
    assert f"base weights of vae: {a.base['vae']!r} and {b.base['vae']!r}" in text
    assert "base weights of dit" not in text
    assert f"{a.final_loss:.6g}" in text
    assert f"held out {b.held_out[-1]['loss']:.6g}" in text


def test_libraries_are_compared_and_old_records_read(run: Path, said: Said, tmp_path: Path) -> None:
    copies = [shutil.copytree(run, tmp_path / name) for name in ("old", "new")]
    for copy, versions in zip(copies, (None, {"torch": "1.0"}), strict=True):
        facts = json.loads((copy / FILE_NAME).read_text())
        del facts["digest"], facts["libraries"], facts["architecture"]
        more = {} if versions is None else {"libraries": versions}
        (copy / FILE_NAME).write_text(json.dumps({**facts, **more}))
    record = record_of(copies[0])
    assert record.libraries == {}
    assert "  libraries" not in said(copies[0] / CHECKPOINT)
    text = said("--diff", run / CHECKPOINT, copies[1] / CHECKPOINT)
    assert "tensors: all are equal" in text
    assert f"version of torch: '{torch.__version__}' and '1.0'" in text


def test_equal_files_differ_in_nothing(run: Path, said: Said, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    text = said("--diff", run / CHECKPOINT, copy / CHECKPOINT)
    assert "tensors: all are equal" in text
    assert "no difference between the trainings is recorded" in text


def test_a_rebuilt_recipe_gives_the_same_bytes(
    values: Values, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a training with relative paths, whose captions and run folder have other content by now."""
    work = tmp_path / "work"
    data = write_images(work / "data", 8)
    write_images(work / "held", 10)
    shutil.copy(work / "held" / "metadata.csv", data / "held.csv")
    table = data / "held.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], *lines[9:]]))
    for name in ("8.png", "9.png"):
        shutil.copy(work / "held" / name, data)
    monkeypatch.chdir(work)
    given = values(
        dataset_base_path="data",
        dataset_metadata_path="data/metadata.csv",
        validation_metadata_path="data/held.csv",
        cache_path="cache",
        lora_dropout=0.1,
        num_epochs=2,
    )
    run = train_to_end(given, Path("runs/tiny"), exports=True)
    expected = {name: (run / name).read_bytes() for name in ("epoch-1.safetensors", str(EXPORT))}
    (data / "metadata.csv").write_text("image,prompt\n0.png,other\n")
    (data / "3.png").unlink()
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "again.yaml"
    text = said(work / run / "epoch-1.safetensors", "--rebuild", out)
    assert f"as {tmp_path / 'again' / 'epoch-1.safetensors'}" in text
    assert f"warning: row 4: image {data / '3.png'}: it is gone" in text
    record = record_of(work / run)
    assert all(f"  {name} {digest}\n" in text for name, digest in record.base.items())
    assert trainer(["--recipe", str(out)]) == 0
    for name, content in expected.items():
        assert (tmp_path / "again" / name).read_bytes() == content
    refused = said(work / run / "epoch-1.safetensors", "--rebuild", out, code=2)
    assert "is there already" in refused


@pytest.mark.parametrize("place", ["run", "encoded"])
def test_the_second_half_of_split_training_is_rebuilt(
    values: Values, said: Said, tmp_path: Path, place: str
) -> None:
    """With what lies encoded in its own run folder, as in Dagster, and elsewhere."""
    train_to_end(values(), tmp_path / place, "--task", "sft:data_process")
    second = values(dataset_base_path=str(tmp_path / place), dataset_metadata_path=None)
    run = train_to_end(second, tmp_path / "run", "--task", "sft:train")
    assert "trained on: rows 1-8" in said(run / CHECKPOINT, "--dataset")
    said(run / CHECKPOINT, "--rebuild", tmp_path / "again.yaml")
    assert (tmp_path / "again.metadata.parquet").exists() == (place == "run")
    assert trainer(["--recipe", str(tmp_path / "again.yaml"), "--checkpoints_only"]) == 0
    again = tmp_path / "again" / CHECKPOINT
    assert again.read_bytes() == (run / CHECKPOINT).read_bytes()


def test_rebuilding_names_weights_that_changed(
    run: Path, said: Said, tmp_path: Path, tiny_qwen: Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    config = (copy / "config.yaml").read_text()
    model = shutil.copytree(tiny_qwen, tmp_path / "model")
    (copy / "config.yaml").write_text(config.replace(str(tiny_qwen), str(model)))
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({n: t + 1 for n, t in load_file(weights).items()}, weights)
    text = said(copy / EXPORT, "--rebuild", tmp_path / "a.yaml")
    assert f"as {tmp_path / 'a' / EXPORT}" in text
    record = record_of(copy)
    assert "warning: vae: its files have the digest" in text
    assert f"  dit {record.base['dit']}\n" in text
    shutil.rmtree(model)
    assert "warning: the base weights cannot be looked at" in said(
        copy / CHECKPOINT, "--rebuild", tmp_path / "b.yaml"
    )
    (copy / "config.yaml").write_text(config.replace("seed: 0", "seed: 1"))
    error = said(copy / CHECKPOINT, "--rebuild", tmp_path / "c.yaml", code=2)
    assert "the config.yaml of the run folder is not that of the training" in error
    assert not (tmp_path / "c.yaml").exists()


def test_headers_have_the_fields_of_modelspec(run: Path, values: Values, tmp_path: Path) -> None:
    def fields(path: Path) -> dict[str, str]:
        notes = read_metadata(path)
        start = "modelspec."
        return {n.removeprefix(start): t for n, t in notes.items() if n.startswith(start)}

    record = record_of(run)
    lora = fields(run / CHECKPOINT)
    assert lora["sai_model_spec"] == "1.0.1"
    assert lora["architecture"] == "qwen-image/lora"
    assert lora["implementation"] == "https://github.com/QwenLM/Qwen-Image"
    assert lora["title"] == f"qwen-image/lora {record.identity[:12]}"
    assert "LoRA of rank 4, alpha 4; 8 samples, step 2" in lora["description"]
    assert not lora.keys() & {"resolution", "date"}
    assert fields(run / EXPORT)["implementation"] == "diffusers"
    size = {"height": 32, "width": 16, "learning_rate": 1e-4}
    _, full = train(values(trainable_models="dit", **size), tmp_path / "full", exports=True)
    folder = full / "exports" / "diffusers" / "transformer"
    for path in (full / CHECKPOINT, folder / "diffusion_pytorch_model.safetensors"):
        whole = fields(path)
        assert whole["architecture"] == "qwen-image"
        assert whole["implementation"] == "diffusers"
        assert whole["resolution"] == "16x32"


def test_every_family_has_an_architecture_and_authors() -> None:
    found = {family.name: family.architecture for family in each_family()}
    assert len({*found.values()}) == len(found)
    for family in each_family():
        assert family.architecture
        assert family.authors.startswith("https://github.com/")
        provenance = {
            "architecture": family.architecture,
            "family": family.name,
            "samples": 1,
            "trained": [family.denoiser],
            "lora": {"rank": 2, "alpha": 1.0},
            "version": "1",
            "identity": "0" * 64,
            "format": "diffusers",
        }
        spec = model_spec(["a.lora_A.weight"], {PROVENANCE_KEY: json.dumps(provenance)})
        assert spec["modelspec.architecture"] == f"{family.architecture}/lora"
        assert spec["modelspec.implementation"] == "diffusers"
