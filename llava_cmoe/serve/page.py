"""The page on top of the API: three files that are the same for everybody and hold nothing of a run.

Everything that the page shows it asks the API for, with the key if there is one; it keeps that in memory alone.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Response

from llava_cmoe.report.pages import style_of

HERE = Path(__file__).parent
PATHS = frozenset({"/", "/page.css", "/page.js"})
"""Where the page's files are."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
"""No script and no style but the two files, no address but this server's, no frame around it, no markup from text."""

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def add_page(app: FastAPI) -> None:
    """Serve the page's files, read once, at `PATHS`."""
    html, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.html", "page.js"))
    style = style_of(HERE / "page.css")

    @app.get("/")
    async def page() -> Response:
        return Response(html, media_type="text/html", headers=HEADERS)

    @app.get("/page.css")
    async def page_style() -> Response:
        return Response(style, media_type="text/css", headers=HEADERS)

    @app.get("/page.js")
    async def page_script() -> Response:
        return Response(script, media_type="text/javascript", headers=HEADERS)
