"""Keys of our resources and our logger in a code location. They are long so that they do not clash
with a team's own `hub`, `parameters` or `console`."""

HUB = "diffsynth_hub"
LAUNCHER = "diffsynth_launcher"
PARAMETERS = "diffsynth_parameters"
LOGGER = "diffsynth"
