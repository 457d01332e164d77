"""From the store to a step: reading ahead in worker processes, and what goes wrong there."""

import pickle
from pathlib import Path

import pytest
from conftest import Values, train, train_to_end
from torch.utils.data import Dataset

from diffsynth_dagster.errors import DownloadError, MetadataError, StoreError, UserError
from diffsynth_dagster.training.batches import Batch, steps_of


class Damaged(Dataset[list[Batch]]):
    """Its third step cannot be read."""

    def __getitem__(self, step: int) -> list[Batch]:
        if step == 2:
            raise StoreError("the shard is damaged", where=f"step {step}", do="encode again")
        return []


@pytest.mark.parametrize("kind", [UserError, MetadataError, DownloadError])
def test_an_error_survives_the_way_between_processes(kind: type[UserError]) -> None:
    error = kind("what", where="where", do="do")
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is kind
    assert str(copied) == str(error)
    assert (copied.what, copied.where, copied.do) == ("what", "where", "do")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_step_that_cannot_be_read_raises_the_error_itself(workers: int) -> None:
    steps = steps_of(Damaged(), 0, 5, workers)
    assert [next(steps), next(steps)] == [(1, []), (2, [])]
    with pytest.raises(StoreError) as caught:
        next(steps)
    assert str(caught.value) == (
        "the shard is damaged\n  where: step 2\n  what to do: encode again"
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_store_gives_one_message(
    values: Values, tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: int
) -> None:
    config = values(cache_path=str(tmp_path / "cache"), dataset_num_workers=workers)
    train_to_end(config, tmp_path / "a")
    for shard in (tmp_path / "cache").rglob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    capfd.readouterr()
    code, _ = train(config, tmp_path / "b")
    printed = capfd.readouterr().err
    assert code == 2
    assert "Traceback" not in printed
    assert "worker process" not in printed
    assert printed.count("error: ") == 1
    assert "what to do" in printed
