"""A hub that is not to be trusted: what it lists, how it answers, and what a recipe asks of it."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest
from hub_server import Hub, serve_hub
from hypothesis import given
from hypothesis import strategies as st

from diffsynth_dagster.config.entries import folder_entry, parse_hub_entry
from diffsynth_dagster.errors import DownloadError, ParameterError, UserError, WeightsError
from diffsynth_dagster.weights import download as downloading
from diffsynth_dagster.weights.download import matches
from diffsynth_dagster.weights.hub import ModelHub

HERE = Path(__file__).parent
PARAMETER = "model_id_with_origin_paths"
FILES = ("vae/model.safetensors", "vae/config.json", "vae/old/model.safetensors", "top.safetensors")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one repository of small files, and an empty folder to download to."""
    for name in FILES:
        path = tmp_path / "hub" / "a" / "b" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "deep" / "er" / "models"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
    with serve_hub(tmp_path / "hub") as running:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", running.url)
        yield running


def fetch(text: str) -> list[Path]:
    return ModelHub.from_environment().files(parse_hub_entry(text, PARAMETER))


def written(folder: Path) -> set[str]:
    return {p.name for p in (folder / "deep").rglob("*") if p.is_file()}


def test_only_what_a_pattern_names_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    """A `*` stands for files of one folder, as it does when the files are looked for afterwards."""
    found = fetch("a/b:vae/*.safetensors")
    base = tmp_path / "deep" / "er" / "models" / "a" / "b"
    assert found == [base / "vae" / "model.safetensors"]
    assert sorted(hub.downloads) == ["vae/config.json", "vae/model.safetensors"]
    hub.downloads.clear()
    assert fetch("a/b:*.safetensors") == [base / "top.safetensors"]
    assert hub.downloads == ["top.safetensors"]
    assert fetch("a/b:vae/") == [base / "vae" / "model.safetensors"]


@pytest.mark.parametrize(
    "path",
    [
        "vae/../../../x.safetensors",
        "vae/./x.safetensors",
        "../x.safetensors",
        "/tmp/hostile/x.safetensors",
        "vae//x.safetensors",
        "vae\\..\\..\\x.safetensors",
        "vae/x\0.safetensors",
        "vae/\ud800.safetensors",
    ],
)
@pytest.mark.parametrize("pattern", ["vae/*", "vae/", "*"])
def test_a_file_outside_the_repository_is_refused_before_any_download(
    hub: Hub, tmp_path: Path, path: str, pattern: str
) -> None:
    hub.extra = [path]
    with pytest.raises(DownloadError, match="lists a file that would lie outside 'a/b'"):
        fetch(f"a/b:{pattern}")
    assert not hub.downloads
    assert not written(tmp_path)


@pytest.mark.parametrize(
    "answer",
    [
        5,
        "no",
        {"Data": 5},
        {"Data": {"Files": 5}},
        {"Data": {"Files": [5]}},
        {"Data": {"Files": [{"Path": 5}]}},
        {"Data": {"Files": [{"Path": ["vae/model.safetensors"]}]}},
        {"Data": {"Files": [{"Path": "vae/x", "Size": "many"}]}},
        {"Data": {"Files": [{"Path": "vae/x", "Size": float("inf")}]}},
        {"Data": None},
    ],
)
def test_a_malformed_list_is_one_message(hub: Hub, tmp_path: Path, answer: object) -> None:
    hub.listed = answer
    with pytest.raises(WeightsError):
        fetch("a/b:vae/*")
    assert not hub.downloads
    assert not written(tmp_path)


def test_a_hub_that_stalls_ends_with_a_message(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.stalls = True
    monkeypatch.setattr(downloading, "LISTING_SECONDS", 2.0)
    start = time.monotonic()
    with pytest.raises(DownloadError, match="did not come in 2 seconds") as error:
        fetch("a/b:vae/*")
    assert time.monotonic() - start < 10
    assert "DIFFSYNTH_SKIP_DOWNLOAD" in str(error.value)


def test_a_download_that_stalls_ends_with_a_message_and_goes_on_later(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model of many files too: no more are asked for."""
    for number in range(10):
        (tmp_path / "hub" / "a" / "b" / f"{number}.safetensors").write_bytes(b"x" * 1000)
    monkeypatch.setenv("MODELSCOPE_DOWNLOAD_TIMEOUT", "1")
    monkeypatch.setenv("MODELSCOPE_DOWNLOAD_MAX_RETRIES", "0")
    hub.sends = 300
    # A process: the client reads its limits when it is imported.
    code = "from test_hub import fetch; fetch('a/b:?.safetensors')"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert time.monotonic() - start < 20
    assert done.returncode != 0
    message = done.stderr.rpartition("DownloadError: ")[2]
    assert message.startswith("'a/b' could not be downloaded: ")
    assert "start it again: it goes on with what it has" in message
    assert "MODELSCOPE_DOWNLOAD_TIMEOUT" in message
    assert len(hub.downloads) == 4

    hub.sends = None
    assert [path.read_bytes() for path in fetch("a/b:?.safetensors")] == [b"x" * 1000] * 10
    assert hub.ranges == ["bytes=300-"] * 4


@pytest.mark.parametrize(
    "text",
    [
        "/etc:passwd",
        "../x:y",
        "a/..:y",
        "./b:y",
        "a/b/c:y",
        "a:y",
        "a/b c:y",
        "a/b\\c:y",
        "a/b",
        "a/b:/etc/passwd",
        "a/b:vae/../../x",
        "a/b:..\\x",
        "a/b:x\0",
    ],
)
def test_an_entry_names_nothing_outside_the_folder_of_models(text: str) -> None:
    for parse in (parse_hub_entry, folder_entry):
        if parse is folder_entry and ":" not in text:
            continue  # a local path
        with pytest.raises(ParameterError):
            parse(text, PARAMETER)


@given(st.text(max_size=12), st.text("ab./:\\*[", max_size=20))
def test_no_text_leads_outside(owner: str, rest: str) -> None:
    """Whatever is accepted lies below `base/owner/name`."""
    try:
        entry = parse_hub_entry(f"{owner}/{rest}", PARAMETER)
    except UserError:
        return
    assert entry.repository is not None
    path = PurePosixPath("base") / entry.repository / entry.pattern
    assert len(PurePosixPath(entry.repository).parts) == 2
    assert ".." not in path.parts
    assert path.parts[0] == "base"


@given(st.text("ab./*?[]", max_size=12), st.text("ab./*?[]", max_size=12))
def test_a_pattern_matches_folder_by_folder(path: str, pattern: str) -> None:
    if matches(path, pattern):
        assert len(PurePosixPath(path).parts) == len(PurePosixPath(pattern).parts)
