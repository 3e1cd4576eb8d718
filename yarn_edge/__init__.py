"""yarn-edge: from a YaRN checkpoint to a quantized GGUF that provably runs what was fine-tuned.

The public Python API: `from yarn_edge import convert_checkpoint, verify_model, …`. Each name is loaded when it is first used
(PEP 562), so `import yarn_edge` costs almost nothing and loads no other package. docs/python.md shows every name at work.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yarn_edge.bench.quality.functions import compare_models, measure_perplexity
    from yarn_edge.chat.opening import open_chat
    from yarn_edge.convert.adapters.requests import AdaptedCheckpoint
    from yarn_edge.convert.hf_to_gguf import convert as convert_checkpoint
    from yarn_edge.convert.patch import patch as patch_gguf
    from yarn_edge.convert.quantize import quantize as quantize_gguf
    from yarn_edge.convert.recipe import QuantOptions
    from yarn_edge.engine.opened import opened as open_engine
    from yarn_edge.engine.sampling import Sampling
    from yarn_edge.errors import YarnEdgeError
    from yarn_edge.flags import PlannerOptions, ScalingOverrides
    from yarn_edge.gguf.read import read_gguf
    from yarn_edge.graph.opening import open_context
    from yarn_edge.inspect.command import inspect_model
    from yarn_edge.inspect.scaling import model_scaling as read_scaling
    from yarn_edge.positions.scaling import RopeScaling
    from yarn_edge.runtime.context import Context
    from yarn_edge.runtime.context_settings import ContextSettings
    from yarn_edge.runtime.model import Model
    from yarn_edge.verify.command import verify as verify_model

__version__ = "0.1.0"

# public name -> (module, its name there). A public name must not be that of a subpackage (convert, inspect, verify, chat, …):
# importing the subpackage would replace it.
_PUBLIC: dict[str, tuple[str, str]] = {
    "AdaptedCheckpoint": ("yarn_edge.convert.adapters.requests", "AdaptedCheckpoint"),
    "Context": ("yarn_edge.runtime.context", "Context"),
    "ContextSettings": ("yarn_edge.runtime.context_settings", "ContextSettings"),
    "Model": ("yarn_edge.runtime.model", "Model"),
    "PlannerOptions": ("yarn_edge.flags", "PlannerOptions"),
    "QuantOptions": ("yarn_edge.convert.recipe", "QuantOptions"),
    "RopeScaling": ("yarn_edge.positions.scaling", "RopeScaling"),
    "Sampling": ("yarn_edge.engine.sampling", "Sampling"),
    "ScalingOverrides": ("yarn_edge.flags", "ScalingOverrides"),
    "YarnEdgeError": ("yarn_edge.errors", "YarnEdgeError"),
    "compare_models": ("yarn_edge.bench.quality.functions", "compare_models"),
    "convert_checkpoint": ("yarn_edge.convert.hf_to_gguf", "convert"),
    "inspect_model": ("yarn_edge.inspect.command", "inspect_model"),
    "measure_perplexity": ("yarn_edge.bench.quality.functions", "measure_perplexity"),
    "open_chat": ("yarn_edge.chat.opening", "open_chat"),
    "open_context": ("yarn_edge.graph.opening", "open_context"),
    "open_engine": ("yarn_edge.engine.opened", "opened"),
    "patch_gguf": ("yarn_edge.convert.patch", "patch"),
    "quantize_gguf": ("yarn_edge.convert.quantize", "quantize"),
    "read_gguf": ("yarn_edge.gguf.read", "read_gguf"),
    "read_scaling": ("yarn_edge.inspect.scaling", "model_scaling"),
    "verify_model": ("yarn_edge.verify.command", "verify"),
}

__all__ = [
    "AdaptedCheckpoint",
    "Context",
    "ContextSettings",
    "Model",
    "PlannerOptions",
    "QuantOptions",
    "RopeScaling",
    "Sampling",
    "ScalingOverrides",
    "YarnEdgeError",
    "compare_models",
    "convert_checkpoint",
    "inspect_model",
    "measure_perplexity",
    "open_chat",
    "open_context",
    "open_engine",
    "patch_gguf",
    "quantize_gguf",
    "read_gguf",
    "read_scaling",
    "verify_model",
]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used, and keep it."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'yarn_edge' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    value = globals()[name] = getattr(import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    """What is loaded, and every public name."""
    return sorted({*globals(), *__all__})
