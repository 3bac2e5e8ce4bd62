"""HTML pages that are one file: nothing is loaded from elsewhere, and browsers are told so."""

import html

from mmrec.config import VERSION
from mmrec.runtime.names import printable

STYLE = """
:root{color-scheme:light dark;
--back:#fff;--text:#1b1b1f;--dim:#6b6f76;--rule:#d8dade}
@media(prefers-color-scheme:dark){:root{
--back:#141518;--text:#e8e8ea;--dim:#9094a0;--rule:#33363d}}
body{background:var(--back);color:var(--text);font:15px/1.5 system-ui,sans-serif;margin:2rem auto;
max-width:72rem;padding:0 1.2rem}
h1{font-size:1.15rem;margin:0 0 .8rem;overflow-wrap:anywhere}
dl{display:flex;flex-wrap:wrap;gap:.4rem 2rem;margin:0 0 1rem}
dt,small,figcaption{color:var(--dim);font-size:.82rem}
dd{margin:0;font-size:1.25rem;font-variant-numeric:tabular-nums}
"""
"""What all pages share: light and dark, headings and figures."""


def page(mark: str, title: str, body: str, *, style: str = "", script: str = "") -> str:
    """Return a page.

    Args:
        mark: its first line, which says who wrote it; see ``mmrec.checkpoint.outputs``.
        title: a line of text.
        body: HTML.
        style: CSS besides ``STYLE``.
        script: JavaScript; a page without allows none.
    """
    scripts = " script-src 'unsafe-inline';" if script else ""
    policy = f"default-src 'none'; style-src 'unsafe-inline';{scripts} img-src data:"
    return (
        f"{mark}<!doctype html><html lang=en><meta charset=utf-8>"
        f'<meta http-equiv=Content-Security-Policy content="{policy}">'
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<meta name=generator content='mmrec {VERSION}'><title>{text(title)}</title>"
        f"<style>{STYLE}{style}</style>{body}"
        f"{f'<script>{script}</script>' if script else ''}</html>\n"
    )


def text(line: str) -> str:
    """Return a line of text as HTML; control characters are shown as escapes."""
    return html.escape(printable(line))


def figures(named: dict[str, str]) -> str:
    """Return a row of figures, each under its name."""
    pairs = (f"<div><dt>{text(n)}</dt><dd>{text(v)}</dd></div>" for n, v in named.items())
    return f"<dl>{''.join(pairs)}</dl>"
