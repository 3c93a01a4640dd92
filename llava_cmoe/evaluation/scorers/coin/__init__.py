"""Protocol `coin`: CoIN's released evaluation scripts as they are, accidents included, so that numbers compare.

One file per rule. Each holds the rule itself, on whatever a JSON file may hold, and `score`, the same for a run's row;
what the scripts stop at raises there; in a run, an answer that cannot be read is wrong. How they join answers with
their files is `released.py`'s.
"""
