"""What is for people: the page at `/` and the documentation at `/docs`, with nothing from other hosts.

Files are read once, when the server starts; a name that is not among them is not found, whatever it looks
like.
"""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Final

from fastapi import APIRouter, Request, Response

from modernbert_decoder.serving.errors import ApiError

_PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Swagger UI sets styles from its script, and shows pictures that it carries inside.
_DOCS_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TYPES: Final = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_SWAGGER_FILES: Final = ("swagger-ui-bundle.js", "swagger-ui.css")
_DOCS_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <title>modernbert-decoder API</title>
  <link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
  <div id="documentation"></div>
  <script src="docs/swagger-ui-bundle.js"></script>
  <script src="docs/start.js"></script>
</body>
</html>
"""
_DOCS_SCRIPT: Final = (
    'SwaggerUIBundle({ url: "openapi.json", dom_id: "#documentation", deepLinking: true, '
    "validatorUrl: null });\n"
)


def page_router() -> APIRouter:
    """Routes of the page and of the documentation."""
    router = APIRouter(include_in_schema=False)
    page = _read(files("modernbert_decoder.serving") / "page")
    docs = {name: _swagger_file(name) for name in _SWAGGER_FILES}
    docs["start.js"] = _DOCS_SCRIPT.encode()

    @router.head("/")
    @router.get("/")
    async def index() -> Response:
        return _file("index.html", page["index.html"], _PAGE_POLICY)

    @router.get("/page/{name}")
    async def page_file(name: str, request: Request) -> Response:
        return _found(page, name, _PAGE_POLICY)

    @router.get("/docs")
    async def documentation() -> Response:
        return _file("docs.html", _DOCS_PAGE.encode(), _DOCS_POLICY)

    @router.get("/docs/{name}")
    async def documentation_file(name: str) -> Response:
        return _found(docs, name, _DOCS_POLICY)

    return router


def _read(folder: Traversable) -> dict[str, bytes]:
    """The files of a folder that browsers may ask for."""
    return {each.name: each.read_bytes() for each in folder.iterdir() if _suffix(each.name) in _TYPES}


def _swagger_file(name: str) -> bytes:
    return (files("fastapi_offline") / "static" / name).read_bytes()


def _suffix(name: str) -> str:
    return name[name.rfind(".") :]


def _found(known: dict[str, bytes], name: str, policy: str) -> Response:
    if name not in known:
        raise ApiError(404, "there is no such file", code="unknown_url")
    return _file(name, known[name], policy)


def _file(name: str, content: bytes, policy: str) -> Response:
    headers = {
        "Content-Type": f"{_TYPES[_suffix(name)]}; charset=utf-8",
        "Cache-Control": "no-cache",
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return Response(content, headers=headers)
