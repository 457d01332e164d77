"""The parts of the offline demo: a data set of handwritten digits, and a reader that judges samples."""
