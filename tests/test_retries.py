"""Which failures Dagster tries again: those that are no mistake of the user's."""

import errno

import pytest
import torch

from diffsynth_dagster.errors import DownloadError, ParameterError, Stopped, TrainingError
from diffsynth_dagster.run.failure import failure_of, recognised
from resources import StepFailure


@pytest.mark.parametrize(
    ("error", "retries"),
    [
        (ParameterError("wrong"), False),
        (TrainingError("astray"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (Stopped(), False),
        (DownloadError("the hub did not answer"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (ZeroDivisionError("nothing is left"), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_what_is_no_mistake_is_tried_again(error: Exception, retries: bool) -> None:
    assert StepFailure.of(failure_of(recognised(error))).allow_retries == retries
