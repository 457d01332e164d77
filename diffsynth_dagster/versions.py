"""Versions of what is made in each stage, raised by hand.

One is raised when a stage makes something else from the same inputs. Then what was made before is stale,
and is made anew. The version of the package is in none of them: a release that changes nothing of what
is made makes nothing stale.
"""

VERSIONS = {
    "weights": 1,
    "metadata": 1,
    "latents": 1,
    "checkpoints": 1,
    "exports": 1,
    "promoted": 1,
}
"""Stage → its version, which Dagster's code versions contain."""
TRAINING = VERSIONS["checkpoints"]
"""Of trainings: it is part of their identity, and a state is gone on with by the same version only."""
