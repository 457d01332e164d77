"""The model hub as a Dagster resource."""

from typing import TYPE_CHECKING

import dagster as dg

if TYPE_CHECKING:
    from diffsynth_dagster.weights.hub import ModelHub


class Hub(dg.ConfigurableResource):
    """Finds and downloads model files.

    It has no options. It is configured by the environment variables `DIFFSYNTH_MODEL_BASE_PATH`,
    `DIFFSYNTH_SKIP_DOWNLOAD` and `MODELSCOPE_ENDPOINT`, which the training processes read as well,
    so that both look in the same place.
    """

    def open(self) -> "ModelHub":
        """The hub, as the environment variables configure it."""
        from diffsynth_dagster.weights.hub import ModelHub

        return ModelHub.from_environment()
