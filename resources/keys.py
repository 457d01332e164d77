"""Keys of our resources and our logger in a code location: a team's own `hub`, `parameters` or
`console` stands beside them."""

HUB = "diffsynth_hub"
LAUNCHER = "diffsynth_launcher"
PARAMETERS = "diffsynth_parameters"
LOGGER = "diffsynth"
