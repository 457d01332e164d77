"""The store of encoded samples, keyed by content, and the manifests that name its keys."""
