"""Learned runs behind an API that speaks OpenAI's chat completions, and a page on top; `app.py` has the routes.

Needs the extra `serve`; only the commands import these files.
"""
