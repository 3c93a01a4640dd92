"""Measuring a run in four separate steps: generate, extract, score, aggregate. Knows tasks, never methods."""
