"""Talking to a run: `session.py` asks the model, `terminal.py` prints what it says."""
