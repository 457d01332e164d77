"""The version of the stored samples."""

LAYOUT_VERSION = 4
"""Raised when stored samples may be wrong, or when their layout changes. Older ones are not read.

4: a file is compared with its checked digest when it is read for encoding. Before, a picture that
was replaced between the check and the encoding was stored under the key of the old picture.
"""
