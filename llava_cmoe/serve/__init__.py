"""A learned run behind an API that speaks OpenAI's chat completions; `app.py` has its routes.

Needs the extra `serve`; only the command imports these files.
"""
