"""`rope_parameters` of a config, as transformers 5 and vLLM read them, that say what a GGUF's positions are.

vLLM has its own rotary classes. Those of its `yarn` read factor, original_max_position_embeddings, beta_fast, beta_slow and
truncate; for A either attn_factor, a multiplier of 0.1 ln s + 1 (until mid 2026), or attention_factor, which is A itself (since
then). Both are written, and each version reads the one that it knows. transformers reads attention_factor.
"""

from __future__ import annotations

from typing import Any

from yarn_edge.errors import YarnEdgeError
from yarn_edge.export.subject import ExportSubject
from yarn_edge.llama_rules.rope_keys import in_keys
from yarn_edge.positions.scaling import SAME_RELATIVE, RopeScaling, yarn_attention_factor

# GGUF architectures of which transformers (modeling_gguf_pytorch_utils.py) makes a config that vLLM then runs, and whose positions
# are one scaling for all layers.
READ_BY_TRANSFORMERS = frozenset({"llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "phi3"})
_SERVE = "serve the checkpoint, whose config vLLM reads by itself"


def config_overrides(subject: ExportSubject) -> dict[str, Any]:
    """What `--hf-overrides` must say: rope_parameters, and head_dim, which transformers does not read from a GGUF.

    Raises YarnEdgeError for positions that vLLM has no parameter for.
    """
    file, positions = subject.file, subject.positions
    experts = file.architecture == "llama" and bool(file.number("expert_count"))
    if file.architecture not in READ_BY_TRANSFORMERS or experts:
        what = "llama with experts" if experts else file.architecture
        raise YarnEdgeError(
            f"{file.path}: transformers makes no config of a GGUF of architecture {what}, which vLLM needs: {_SERVE}"
        )
    if len(subject.shards) > 1:
        raise YarnEdgeError(
            f"{file.path}: is the first of {len(subject.shards)} files, and vLLM loads a single one: merge them with llama-gguf-split "
            "--merge"
        )
    wanted = positions.wanted
    for what, open_ in _beyond(wanted, positions.own_sliding is not None).items():
        if open_:
            raise YarnEdgeError(f"{file.path}: positions need yarn-edge: vLLM has no parameter for {what}: {_SERVE}")
    scaling = in_keys(wanted)
    assert scaling is not None  # every static method without a table has keys
    head_dim = file.number("attention.key_length")
    if head_dim is None:
        head_dim = file.required_int("embedding_length") // file.required_int("attention.head_count")
    block = _described(scaling)
    if scaling.dim != head_dim:
        block["partial_rotary_factor"] = scaling.dim / head_dim
    return {"rope_parameters": block, "head_dim": int(head_dim)}


def _beyond(wanted: RopeScaling, own_sliding: bool) -> dict[str, bool]:
    """What has no parameter, and whether these positions need it."""
    scaling = in_keys(wanted)
    attention = scaling is None or (scaling.method != "yarn" and abs(scaling.attention_factor - 1) > SAME_RELATIVE)
    return {
        "a table of frequencies": wanted.frequency_factors is not None,
        "angles that depend on the length": scaling is None,
        "another base in layers with a sliding window": own_sliding,
        "a factor of the softmax scale": abs(wanted.softmax_factor - 1) > SAME_RELATIVE,
        "a ramp over turns": wanted.ramp != "index" and wanted.method in ("yarn", "ntk-by-parts"),
        f"ext_factor {wanted.ext_factor:g}": scaling is not None
        and scaling.method == "yarn"
        and abs(scaling.ext_factor - 1) > SAME_RELATIVE,
        f"attention factor {wanted.attention_factor:g} without YaRN": attention,
    }


def _described(scaling: RopeScaling) -> dict[str, Any]:
    values: dict[str, Any] = {
        "rope_type": "default" if scaling.method == "none" else scaling.method,
        "rope_theta": scaling.rope_theta,
    }
    if scaling.method != "none":
        values["factor"] = scaling.factor
    if scaling.method != "yarn":
        return values
    values["original_max_position_embeddings"] = scaling.original_context
    values |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    if not scaling.truncate:
        values["truncate"] = False
    default = yarn_attention_factor(scaling.factor)
    if abs(scaling.attention_factor / default - 1) > SAME_RELATIVE:
        values["attention_factor"] = scaling.attention_factor
        values["attn_factor"] = scaling.attention_factor / default
    return values
