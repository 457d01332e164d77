"""The content-addressed store of encoded samples."""
