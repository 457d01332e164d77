"""`report.html` of a run folder: one file that shows in a browser what came of a training."""
