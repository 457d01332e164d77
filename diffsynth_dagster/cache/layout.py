"""The version of the stored samples, and the folders of row sets."""

LAYOUT_VERSION = 4
"""Raised when stored samples may be wrong, or when their layout changes. Older ones are not read.

4: a file is compared with its checked digest when it is read for encoding. Before, a picture that
was replaced between the check and the encoding was stored under the key of the old picture.
"""

SAMPLES_FOLDER, EVALUATED_FOLDER = ".sampled", ".evaluated"
"""Folders inside the run folder: of the row set `samples`, and of the prompts that a user's
evaluation asked for last."""
