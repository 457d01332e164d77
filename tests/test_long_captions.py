"""Captions that are longer than the text encoder reads are said to be, and may be read in chunks."""

import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
from conftest import Values, make_config, train_to_end, write_tokenizer
from dagster_support import execute, home, write_recipe
from families.stable_diffusion import cases as sd15
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer, Qwen2Tokenizer

from assets.common import asset_key
from diffsynth_dagster.cache.long_captions import (
    FILE_NAME,
    caption_limit,
    count_if_there,
    read_long_captions,
)
from diffsynth_dagster.data.table.checked_table import read_checked
from diffsynth_dagster.facts import FactCache
from diffsynth_dagster.families import find_family
from diffsynth_dagster.families.limits import MOST_BYTES_OF_ONE, TokenLimit
from diffsynth_dagster.families.shared.qwen_vl import count_before
from diffsynth_dagster.families.shared.text import padded_tokens, tokens


@pytest.fixture(scope="module")
def clip_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("clip")
    sd15.write_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)


def test_what_every_family_reads() -> None:
    most = {"stable_diffusion": 77, "stable_diffusion_xl": 77, "flux": 512, "wanvideo": 512}
    for name, want in {**most, "qwen_image": 1024, "ltx2": 1024}.items():
        limit = caption_limit(find_family(name))
        assert limit is not None, name
        assert limit.most == want


@pytest.mark.parametrize("count", [74, 75, 76])
def test_clip_cuts_what_is_counted_as_long(clip_tokenizer: Any, count: int) -> None:
    limit = caption_limit(find_family("stable_diffusion"))
    assert limit is not None
    short, more = ({"prompt": " ".join("a" * n)} for n in (count, count + 1))
    read = padded_tokens(clip_tokenizer, [short, more], limit.most)
    (counted,) = limit.count(clip_tokenizer, [more["prompt"]])
    assert counted == count + 1 + 2
    assert (counted > limit.most) is (read[0, :-1].tolist() == read[1, :-1].tolist())


@pytest.mark.parametrize("count", [1018, 1019, 1020])
def test_qwen_cuts_what_is_counted_as_long(tmp_path: Path, count: int) -> None:
    """The template before the prompt is read beside the 1024 tokens, what stands behind among them."""
    from diffsynth_dagster.families.qwen_image.stages import PROMPT_LIMIT, PROMPT_TEMPLATE

    write_tokenizer(tmp_path)
    tokenizer: Any = Qwen2Tokenizer.from_pretrained(tmp_path)
    behind = len(tokenizer(PROMPT_TEMPLATE.split("{}")[1]).input_ids)
    text = "ab" * 600
    caption = text[: count + 5 - behind]
    (counted,) = PROMPT_LIMIT.count(tokenizer, [caption])
    whole = PROMPT_TEMPLATE.format(caption)
    (read,) = tokens(tokenizer, [whole], 1024 + count_before(tokenizer, PROMPT_TEMPLATE))
    assert counted == count + 5
    assert (counted > PROMPT_LIMIT.most) is (len(read) < len(tokenizer(whole).input_ids))


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.text(max_size=40) | st.text("a e'\t", max_size=40))
def test_captions_that_are_not_counted_are_read_whole(clip_tokenizer: Any, text: str) -> None:
    limit = TokenLimit("tokenizer", 24)
    size = len(text.encode("utf-8", "replace"))
    if (size if text.isascii() else size * MOST_BYTES_OF_ONE) <= limit.always_read:
        assert limit.count(clip_tokenizer, [text])[0] <= limit.most


LONG = "a photograph " * 90


def write_data(pictures: Path, folder: Path, long: tuple[int, ...]) -> Path:
    """The pictures with captions, too long in these rows (from 1)."""
    shutil.copytree(pictures, folder, dirs_exist_ok=True)
    names = [f"{index}.png" for index in range(8)]
    prompts = [LONG if row in long else f"a cat {row}" for row in range(1, 9)]
    pl.DataFrame({"image": names, "prompt": prompts}).write_csv(folder / "metadata.csv")
    return folder


def test_long_captions_are_said_once_counted(
    values: Values,
    pictures: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = write_data(pictures, tmp_path / "data", (3, 6))
    given = values(
        dataset_base_path=str(data),
        dataset_metadata_path=str(data / "metadata.csv"),
        task="sft:data_process",
    )
    run = tmp_path / "run"
    says = (
        "the captions of 2 rows, the first is 3, are longer than the 1024 tokens that the text "
        "encoder reads (the longest has "
    )
    train_to_end(given, run)
    assert says in capfd.readouterr().err
    listed = pl.read_parquet(run / FILE_NAME)
    assert listed["row"].to_list() == [3, 6]
    assert listed["tokens"].min() == listed["tokens"].max()
    known = read_long_captions(run)
    assert known is not None
    assert known.rows == tuple(listed.iter_rows())
    with monkeypatch.context() as patch:
        patch.setattr(TokenLimit, "count", None)  # it is not counted again
        train_to_end(given, run)
    assert says in capfd.readouterr().err

    table = read_checked(run)
    config = make_config({**given, "output_path": str(run)})
    facts = FactCache(tmp_path / "facts.sqlite")
    assert count_if_there(config, table, facts) == known
    gone = config.model_copy(update={"tokenizer_path": str(tmp_path / "nothing")})
    assert count_if_there(gone, table, facts) is None

    write_data(pictures, data, ())
    train_to_end(given, run)
    assert "longer than" not in capfd.readouterr().err
    assert not (run / FILE_NAME).exists()


def test_the_check_says_what_is_cut(values: Values, pictures: Path, tmp_path: Path) -> None:
    """Where the model's files are there; before they are, the latents say it."""
    data = write_data(pictures, tmp_path / "data", (2,))
    given = values(dataset_base_path=str(data), dataset_metadata_path=str(data / "metadata.csv"))
    write_recipe(tmp_path / "recipes", "long", given)
    with dg.DagsterInstance.from_config(str(home(tmp_path / "home"))) as instance:
        key = asset_key("long", "metadata")
        events = execute(tmp_path / "recipes", "train_long", instance, key)
    (made,) = [e.step_materialization_data for e in events if e.is_step_materialization]
    facts = made.materialization.metadata
    assert facts["long_captions"].value == 1
    assert "| 2 | " in str(facts["long_captions/rows"].value)
    (checked,) = [
        e.asset_check_evaluation_data
        for e in events
        if e.event_type_value == "ASSET_CHECK_EVALUATION"
    ]
    assert checked.passed
    assert "the caption of row 2 is longer than the 1024 tokens" in (checked.description or "")
