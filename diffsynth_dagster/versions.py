"""Versions of the results of each stage, raised by hand.

Raise a version when the stage computes another result from the same inputs. Existing results are
then stale and are computed again. The version of the package does not matter here: a release that
changes no results makes nothing stale.
"""

VERSIONS = {
    "weights": 1,
    "metadata": 1,
    "latents": 1,
    "checkpoints": 1,
    "exports": 1,
    "promoted": 1,
}
"""Stage → its version, which is part of the asset's code version in Dagster."""
TRAINING = VERSIONS["checkpoints"]
"""Version of the training. It is part of a training's identity: a saved state can only be resumed
by the same version."""
