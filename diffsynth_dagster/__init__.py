"""The training engine of diffsynth-dagster: plain Python that knows nothing of Dagster."""

__version__ = "0.1.0"
