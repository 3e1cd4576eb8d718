"""yarn-edge: from a YaRN checkpoint to a quantized GGUF that provably runs what was fine-tuned."""

__version__ = "0.1.0"
