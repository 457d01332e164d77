"""Images and videos: from files to tensors, and whether the files are whole."""
