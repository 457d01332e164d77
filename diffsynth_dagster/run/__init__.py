"""What surrounds the training loop: the run folder and its record, reporting, failing and stopping,
and whether a step is up to date."""
