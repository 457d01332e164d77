"""What surrounds a training and is none: its run folder and record, what it reports, how it fails or stops,
and whether it is up to date."""
