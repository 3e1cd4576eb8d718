"""POST /v1/embeddings: vectors of texts."""

from __future__ import annotations

import base64
from typing import Any, Literal

import numpy as np

from yarn_edge.errors import YarnEdgeError
from yarn_edge.serve.parts import text_or_tokens
from yarn_edge.serve.requests import CheckedRequest

MOST_INPUTS = 2048


class EmbeddingsRequest(CheckedRequest):
    """POST /v1/embeddings."""

    input: Any
    encoding_format: Literal["float", "base64"] = "float"

    def inputs(self) -> list[str | list[int]]:
        """The texts, or tokens. Raises YarnEdgeError for what is neither, or too many."""
        given = self.input
        several = isinstance(given, list) and given and all(isinstance(one, (str, list)) for one in given)
        inputs = given if several else [given]
        if len(inputs) > MOST_INPUTS:
            raise YarnEdgeError(f"input: {len(inputs)} texts were given, at most {MOST_INPUTS} are allowed")
        return [text_or_tokens(one, f"input[{number}]" if several else "input") for number, one in enumerate(inputs)]


def embeddings_response(
    model: str, vectors: list[Any], n_tokens: int, encoding: Literal["float", "base64"]
) -> dict[str, Any]:
    """The response. base64 is of the vector in little-endian float32."""
    shown = [
        base64.b64encode(vector.astype("<f4").tobytes()).decode()
        if encoding == "base64"
        else [float(value) for value in vector.astype(np.float32)]
        for vector in vectors
    ]
    data = [{"object": "embedding", "index": index, "embedding": one} for index, one in enumerate(shown)]
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return {"object": "list", "model": model, "data": data, "usage": usage}
