"""Metadata tables: read, and checked row by row and file by file."""
