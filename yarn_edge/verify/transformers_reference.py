"""The reference for logits: the checkpoint itself, run by transformers in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.positions import rope
from yarn_edge.positions.scaling import RopeScaling
from yarn_edge.regular_file import refuse_special_files


@dataclass(frozen=True)
class Divergence:
    """How far logits are from the reference over `n_tokens` predictions. KL is KL(reference || other) in nats."""

    n_tokens: int
    kl_mean: float
    kl_max: float
    top1: float


def reference_logits(
    folder: Path, tokens: Sequence[int], replaced: RopeScaling | None = None
) -> npt.NDArray[np.float32]:
    """The logits of every position by transformers, float32, shape (n_tokens, n_vocab).

    replaced: a static scaling whose frequencies and A replace those that transformers reads from config.json (only for flags,
    and for dialects that transformers reads differently). Raises YarnEdgeError without transformers, and if it cannot load
    the checkpoint.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise YarnEdgeError("comparing with a checkpoint needs transformers: pip install 'yarn-edge[hf]'") from error
    refuse_special_files(folder)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if replaced is not None:
            config.rope_parameters = {"rope_type": "default", "rope_theta": replaced.rope_theta}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation="eager",
        )
    except Exception as error:  # many libraries raise many kinds
        raise YarnEdgeError(f"{folder}: transformers cannot load it: {one_line(str(error), 300)}") from error
    if replaced is not None:
        _replace_rotary(model, replaced)
    model.eval()
    with torch.inference_mode():
        logits = model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return np.asarray(logits.numpy(), dtype=np.float32)


def _replace_rotary(model: Any, scaling: RopeScaling) -> None:
    """Set the reference's frequencies and A in every rotary embedding of a transformers model."""
    import torch

    rotary = [m for m in model.modules() if hasattr(m, "inv_freq") and hasattr(m, "attention_scaling")]
    if not rotary or any(m.inv_freq.shape != (scaling.dim // 2,) for m in rotary):
        raise YarnEdgeError("transformers keeps this model's positions elsewhere: they cannot be replaced")
    for module in rotary:
        module.inv_freq = torch.from_numpy(rope.inv_freq(scaling).astype(np.float32))
        module.attention_scaling = scaling.attention_factor


def rope_parameters(scaling: RopeScaling) -> dict[str, Any]:
    """A RopeScaling as transformers v5's rope_parameters."""
    if scaling.method == "none":
        return {"rope_type": "default", "rope_theta": scaling.rope_theta}
    parameters = {"rope_type": scaling.method, "rope_theta": scaling.rope_theta, "factor": scaling.factor}
    if scaling.method == "yarn":
        parameters |= {
            "original_max_position_embeddings": scaling.original_context,
            "attention_factor": scaling.attention_factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
        }
    return parameters


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """The log-softmax of each row in float64, shape (n, n_vocab)."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=1, keepdims=True)))


def divergence(truth: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> Divergence:
    """KL divergence and top-1 agreement of two sets of logits, each (n_tokens, n_vocab)."""
    if truth.shape != other.shape:
        raise YarnEdgeError(f"logits of shape {truth.shape} and {other.shape} cannot be compared")
    kls: list[float] = []
    same = 0
    for start in range(0, len(truth), 64):
        p, q = log_softmax(truth[start : start + 64]), log_softmax(other[start : start + 64])
        kls += (np.exp(p) * (p - q)).sum(axis=1).tolist()
        same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
    return Divergence(len(kls), float(np.mean(kls)), float(np.max(kls)), same / len(kls))


def merge(parts: Sequence[Divergence]) -> Divergence:
    """The divergence over all tokens of `parts`."""
    n = sum(p.n_tokens for p in parts)
    mean, top1 = (sum(getattr(p, name) * p.n_tokens for p in parts) / n for name in ("kl_mean", "top1"))
    return Divergence(n, mean, max(p.kl_max for p in parts), top1)
