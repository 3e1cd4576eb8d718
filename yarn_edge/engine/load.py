"""What an engine is doing, and has done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineLoad:
    """parallel: answers that may run at once; running, waiting: requests now. The tokens of all prompts so far were evaluated, shared
    with a conversation in the cache, or restored from disk; generated_tokens: of all answers. cells: tokens that the cache holds,
    cells_used: that it does hold, for running answers and for later ones.
    """

    parallel: int
    running: int
    waiting: int
    prompt_tokens_evaluated: int
    prompt_tokens_shared: int
    prompt_tokens_restored: int
    generated_tokens: int
    cells_used: int
    cells: int
    requests_total: int
    requests_cancelled: int
