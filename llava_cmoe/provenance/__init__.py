"""Whole files, their hashes, the versions behind the numbers, and which calls made what."""
