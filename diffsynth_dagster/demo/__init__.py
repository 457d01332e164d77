"""What the offline demo needs: a data set of handwritten digits and a reader that judges samples."""
