"""The demo's WSGI site: the source of every module of the running Python's standard library, kept in SQLite, as highlighted HTML.

    /             the modules
    /module/NAME  its source, and the modules that mention its name; cached, unless the query says nocache

A miss does real work: read the source, tokenise it, render it, and a full-text query. Settings come by environment: DEMO_DB, DEMO_SEGMENT.
"""

from __future__ import annotations

import builtins
import html
import io
import keyword
import os
import sqlite3
import sysconfig
import threading
import time
import tokenize
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import shmcache

TTL = 3600.0
NAMES = frozenset(dir(builtins))
local = threading.local()


def build(path: str, progress: Callable[[float], None]) -> list[str]:
    """Fill the database from the standard library: the modules' names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in sorted(root.rglob("*.py")) if "site-packages" not in p.parts and p.stat().st_size]
    names = []
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE module (name TEXT PRIMARY KEY, source TEXT)")
    db.execute("CREATE VIRTUAL TABLE words USING fts5(name UNINDEXED, source)")
    for i, file in enumerate(files):
        name = ".".join(file.relative_to(root).with_suffix("").parts)
        source = file.read_text("utf-8", "replace")
        db.execute("INSERT INTO module VALUES (?, ?)", (name, source))
        db.execute("INSERT INTO words VALUES (?, ?)", (name, source))
        names.append(name)
        progress((i + 1) / len(files))
    db.commit()
    db.close()
    return names


def database() -> sqlite3.Connection:
    if not hasattr(local, "db"):
        local.db = sqlite3.connect(f"file:{os.environ['DEMO_DB']}?mode=ro", uri=True)
    connection: sqlite3.Connection = local.db
    return connection


def highlight(source: str) -> str:
    """HTML of Python source; of one that does not tokenise, the plain text."""
    out: list[str] = []
    row, column = 1, 0
    lines = source.splitlines(keepends=True)
    try:
        for kind, text, (r, c), (end_r, end_c), _ in tokenize.generate_tokens(io.StringIO(source).readline):
            while row < r and row <= len(lines):
                out.append(html.escape(lines[row - 1][column:]))
                row, column = row + 1, 0
            if row <= len(lines):
                out.append(html.escape(lines[row - 1][column:c]))
            style = {tokenize.COMMENT: "c", tokenize.STRING: "s", tokenize.NUMBER: "n"}.get(kind)
            if kind == tokenize.NAME:
                style = "k" if keyword.iskeyword(text) else "b" if text in NAMES else None
            out.append(f'<i class="{style}">{html.escape(text)}</i>' if style else html.escape(text))
            row, column = end_r, end_c
    except (tokenize.TokenError, SyntaxError):
        return html.escape(source)
    return "".join(out)


def page(name: str) -> bytes | None:
    """The page of a module; None: there is none."""
    row = database().execute("SELECT source FROM module WHERE name = ?", (name,)).fetchone()
    if row is None:
        return None
    word = name.rpartition(".")[2].replace('"', "")
    mentions = database().execute("SELECT name FROM words WHERE words MATCH ? ORDER BY rank LIMIT 30", (f'source:"{word}"',)).fetchall()
    links = " ".join(f'<a href="/module/{html.escape(m)}">{html.escape(m)}</a>' for (m,) in mentions)
    style = "i{font-style:normal}.k{color:#00f}.s{color:#080}.c{color:#888}.n{color:#a00}.b{color:#808}"
    title = html.escape(name)
    return (
        f"<!doctype html><title>{title}</title><style>{style}</style><h1>{title}</h1><p>Mentioned in: {links}</p>"
        f"<pre>{highlight(row[0])}</pre>"
    ).encode()


class Site:
    """The WSGI application; `cache` is attached by each worker at its first request, so that it works with and without --preload."""

    def __init__(self) -> None:
        self.cache: Any = None

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if self.cache is None:
            self.cache = shmcache.attach(os.environ["DEMO_SEGMENT"])
        began = time.perf_counter()
        path = unquote(environ["PATH_INFO"])
        state = "hit"
        if path == "/":
            rows = database().execute("SELECT name FROM module ORDER BY name").fetchall()
            body: bytes | None = "".join(f'<a href="/module/{html.escape(n)}">{html.escape(n)}</a><br>' for (n,) in rows).encode()
            state = "none"
        elif path.startswith("/module/"):
            name = path.removeprefix("/module/")

            def miss() -> bytes | None:
                nonlocal state
                state = "miss"
                return page(name)

            uncached = environ.get("QUERY_STRING") == "nocache"
            body = miss() if uncached else self.cache.get_or_set(f"page:{name}", miss, TTL)
        else:
            body = None
        micros = round(1e6 * (time.perf_counter() - began))
        headers = [("Content-Type", "text/html; charset=utf-8"), ("X-Cache", state), ("X-Pid", str(os.getpid())), ("X-Micros", str(micros))]
        if body is None:
            body = b"not there"
            start_response("404 Not Found", [*headers, ("Content-Length", str(len(body)))])
        else:
            start_response("200 OK", [*headers, ("Content-Length", str(len(body)))])
        return [body]


application = Site()
