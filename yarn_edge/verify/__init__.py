"""The proof that what runs is what was fine-tuned: metadata, rope kernel, live graph, tokenizer, logits.

May import: runtime, checkpoint and below.
"""
