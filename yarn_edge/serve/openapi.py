"""/openapi.json: the routes and the fields that requests may have, for programs that read OpenAPI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yarn_edge.serve.requests import CheckedRequest

_JSON = {"application/json": {"schema": {"type": "object"}}}
# What a route without a body answers.
_FACTS = {
    "/health": _JSON,
    "/metrics": {"text/plain": {"schema": {"type": "string"}}},
    "/openapi.json": _JSON,
    "/v1/models": _JSON,
    "/v1/models/{name}": _JSON,
}
_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}
_TYPES = {"css": "text/css", "html": "text/html", "js": "text/javascript"}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "object", "required": ["message", "type"]}},
}


def openapi_schema(requests: Mapping[str, type[CheckedRequest]], pages: Mapping[str, str]) -> dict[str, Any]:
    """The document. requests: what routes with a body read, by path; pages: files by path."""
    paths: dict[str, Any] = {path: {"get": _route(content)} for path, content in _FACTS.items()}
    for path, file in pages.items():
        kind = _TYPES[file.rpartition(".")[2]]
        paths[path] = {"get": _route({kind: {"schema": {"type": "string"}}})}
    for path, request in requests.items():
        schema = request.model_json_schema()
        content = {**_JSON, **_STREAM} if "stream" in schema["properties"] else _JSON
        body = {"required": True, "content": {"application/json": {"schema": {**schema, "additionalProperties": True}}}}
        paths[path] = {"post": {"requestBody": body, **_route(content)}}
    named = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    paths["/v1/models/{name}"]["get"]["parameters"] = [named]
    keys = {"bearer": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "yarn-edge", "version": "1"},
        "paths": paths,
        "components": {"securitySchemes": keys},
        "security": [{"bearer": []}, {}],
    }


def _route(content: Mapping[str, Any]) -> dict[str, Any]:
    error = {"description": "an error", "content": {"application/json": {"schema": _ERROR}}}
    return {"responses": {"200": {"description": "the answer", "content": content}, "4XX": error, "5XX": error}}
