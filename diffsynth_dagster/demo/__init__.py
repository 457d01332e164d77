"""The offline demo: a data set of handwritten digits, and a reader that judges samples."""
