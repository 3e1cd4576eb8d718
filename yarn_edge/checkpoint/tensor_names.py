"""The names of a checkpoint's tensors, as transformers has them: without what wrappers put before and between them.

transformers adds or takes away one `model.` in silence. It does not know the names that `torch.compile`, FSDP, DeepSpeed, DDP and
peft give (it would start such tensors at random), but they say nothing about the model, so they are taken away here, for
`convert` by `canonical_names` and for `verify` by KEY_MAPPING.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from yarn_edge.errors import YarnEdgeError, one_line

_MACHINE_MADE = "_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module"
_FRONT = (
    rf"^(?:(?:module|base_model|{_MACHINE_MADE})\.)+"  # base_model: peft's; its `model.` is one of transformers' kind
)
_BETWEEN = rf"(?<=\.)(?:(?:{_MACHINE_MADE})\.)+"
# For transformers' from_pretrained(key_mapping=…). Each row replaces one place, and layers are wrapped inside wrapped models.
KEY_MAPPING = {_FRONT: "", **{_BETWEEN + "(?:)" * i: "" for i in range(3)}}
_BASE = "model."
_HEAD = "lm_head."
# What earlier versions of transformers saved though they compute it: masks, and the angles' tables. Never a weight.
_COMPUTED = re.compile(
    r"(?:^|\.)(?:rotary_emb\.(?:cos|sin)_cached|(?:self_)?attn\.masked_bias|causal_mask|position_ids)$"
)
_MASK = re.compile(r"(?:^|\.)(?:self_)?attn\.bias$")


def canonical_names(source: str, names: Iterable[str]) -> tuple[dict[str, str], str]:
    """(name in transformers' class -> name in the checkpoint, the wrapper before all names or "").

    source: the checkpoint, for messages. Raises YarnEdgeError if only some names are wrapped, or two would become one.
    """
    found: dict[str, str] = {}
    fronts: dict[str, str] = {}
    for name in names:
        front = re.match(_FRONT, name)
        fronts.setdefault(front[0] if front else "", name)
        known = _with_base(re.sub(_BETWEEN, "", re.sub(_FRONT, "", name)))
        if known in found:
            raise YarnEdgeError(
                f"{source}: tensors {one_line(found[known], 100)} and {one_line(name, 100)} are both {one_line(known, 100)} of the "
                "model: remove one of them"
            )
        found[known] = name
    if len(fronts) > 1:
        one, other = (one_line(name, 100) for name in list(fronts.values())[:2])
        raise YarnEdgeError(
            f"{source}: the names of tensors begin in different ways ({one}, {other}): save the model without its wrapper"
        )
    return found, next(iter(fronts), "").removesuffix(".")


def _with_base(name: str) -> str:
    """A name with transformers' `model.` before all but the head, once."""
    inner = name.removeprefix(_BASE)
    if inner.startswith((_BASE, _HEAD)):
        return inner
    return name if inner != name or name.startswith(_HEAD) else _BASE + name


def is_computed(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a saved tensor is one that transformers computes itself and ignores: a causal mask, or cached angles."""
    return bool(_COMPUTED.search(name)) or (bool(_MASK.search(name)) and len(shape) == 4 and shape[:2] == (1, 1))
