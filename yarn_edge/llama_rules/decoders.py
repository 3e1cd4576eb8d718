"""Which architectures write text token by token, as `chat` and every measurement of it need: a decoder with causal attention.

llama.cpp loads others too: for embeddings, for speech, for diffusion, as drafts of another model. It has no cache for most of them,
and asserts or crashes where one is used. Source: llama-model.cpp (create_memory, llama_model_has_encoder), llama-arch.cpp
(llm_arch_is_diffusion) and llama-context.cpp of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile

_EMBEDDING = "it makes embeddings"
_DIFFUSION = "it fills in all tokens of an answer at once (diffusion)"
_ENCODER = "it has an encoder, which reads the text first"
_DRAFT = "it only drafts for another model"
NO_DECODERS: dict[str, str] = {
    "bert": _EMBEDDING,
    "modern-bert": _EMBEDDING,
    "nomic-bert": _EMBEDDING,
    "nomic-bert-moe": _EMBEDDING,
    "neo-bert": _EMBEDDING,
    "jina-bert-v2": _EMBEDDING,
    "jina-bert-v3": _EMBEDDING,
    "eurobert": _EMBEDDING,
    "gemma-embedding": _EMBEDDING,
    "llama-embed": _EMBEDDING,
    "dream": _DIFFUSION,
    "llada": _DIFFUSION,
    "llada-moe": _DIFFUSION,
    "rnd1": _DIFFUSION,
    "t5": _ENCODER,
    "t5encoder": _ENCODER,
    "eagle3": _DRAFT,
    "dflash": _DRAFT,
    "gemma4-assistant": _DRAFT,
    "clip": "it is the image part of another model (--mmproj of llama.cpp)",
    "wavtokenizer-dec": "it makes sound",
}


def check_decoder(file: GGUFFile) -> None:
    """Raise YarnEdgeError, with the architecture, for a model that does not write text token by token."""
    arch = file.architecture
    why = NO_DECODERS.get(arch)
    if why is None and file.metadata.get(f"{arch}.attention.causal") is False:
        why = f"{arch}.attention.causal is false: every token sees those after it"
    if why is not None:
        raise YarnEdgeError(
            f"{file.path}: architecture {arch} is not a causal language model: {why}; yarn-edge runs models that write text "
            "token by token"
        )
