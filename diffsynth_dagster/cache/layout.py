"""The version of what the store holds."""

LAYOUT_VERSION = 4
"""Raised when stored samples may be wrong or are laid out differently: older ones are not read.

4: files are compared with what was checked when they are read; before, a picture exchanged between
the check and the encoding was stored under the key of the old one.
"""
