"""Images, videos and sound: read them into tensors, and check that the files are complete."""
