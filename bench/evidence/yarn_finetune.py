"""A small YaRN fine-tune by the paper's recipe (section 4.1), which makes a real long-context checkpoint to convert and measure.

    python -m yarn_edge.bench.evidence.yarn_finetune CHECKPOINT --text FILE -o FOLDER --length 32k --steps 200

The YaRN block in CHECKPOINT's config.json is used for training (`evidence.smollm2` writes one). AdamW (0.9, 0.95) without weight
decay, learning rate 2e-5 after 20 warm-up steps, next-token loss on windows of --length tokens. The last tenth of the text is held
out, and its loss is reported before and after. Needs torch and transformers. Runs in bfloat16 with float32 weights on a GPU, in
float32 on a CPU (for trying it out).
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.flags import count, length
from yarn_edge.progress import bar, note
from yarn_edge.text_file import read_text
from yarn_edge.writer import partial_folder, publish_folder

from ..standalone import run_module

BETAS, LEARNING_RATE, WARM_UP = (0.9, 0.95), 2e-5, 20
HELD_OUT = 0.1  # of the text
LOSS_TOKENS = 4096  # tokens whose logits are in memory at once


@dataclass(frozen=True)
class TrainingRecipe:
    """How to train. length: tokens of a window; batch: windows of a step."""

    length: int
    steps: int
    batch: int
    learning_rate: float
    seed: int
    device: str


def windows(tokens: Any, recipe: TrainingRecipe) -> Iterator[Any]:
    """Yield batches of windows from random places, (batch, length + 1), endlessly."""
    import torch

    random = torch.Generator().manual_seed(recipe.seed)
    while True:
        starts = torch.randint(0, len(tokens) - recipe.length, (recipe.batch,), generator=random)
        yield torch.stack([tokens[at : at + recipe.length + 1] for at in starts.tolist()])


def next_token_loss(model: Any, batch: Any) -> Any:
    """Mean negative log-likelihood in nats of (batch, length + 1) tokens; logits of LOSS_TOKENS at a time."""
    import torch
    from torch.utils.checkpoint import checkpoint

    hidden = model.model(batch[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
    targets = batch[:, 1:].flatten()

    def part(rows: Any, wanted: Any) -> Any:
        return torch.nn.functional.cross_entropy(model.lm_head(rows).float(), wanted, reduction="sum")

    pieces = zip(hidden.split(LOSS_TOKENS), targets.split(LOSS_TOKENS), strict=True)
    return sum(checkpoint(part, rows, wanted, use_reentrant=False) for rows, wanted in pieces) / len(targets)


def train(model: Any, tokens: Any, held_out: Any, recipe: TrainingRecipe) -> dict[str, Any]:
    """Train in place. Returns the loss of every step, and the held-out loss before and after, in nats per token."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=BETAS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    mixed = torch.autocast(recipe.device, torch.bfloat16, enabled=recipe.device != "cpu")
    before = held_out_loss(model, held_out, recipe)
    losses: list[float] = []
    began = time.perf_counter()
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # not every supported version has its new name
        model.gradient_checkpointing_enable()
    with bar("Training", recipe.steps) as advance:
        for batch in windows(tokens, recipe):
            if len(losses) == recipe.steps:
                break
            with mixed:
                loss = next_token_loss(model, batch.to(recipe.device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
            advance(1, f"loss {losses[-1]:.3f}")
    seconds = time.perf_counter() - began
    after = held_out_loss(model, held_out, recipe)
    return {"losses": losses, "held_out_before": before, "held_out_after": after, "seconds": seconds}


def held_out_loss(model: Any, tokens: Any, recipe: TrainingRecipe) -> float:
    """Mean loss over all whole windows of the held-out text, in nats per token."""
    import torch

    model.eval()
    mixed = torch.autocast(recipe.device, torch.bfloat16, enabled=recipe.device != "cpu")
    starts = range(0, len(tokens) - recipe.length, recipe.length)
    with torch.no_grad(), mixed:
        losses = [
            float(next_token_loss(model, tokens[None, at : at + recipe.length + 1].to(recipe.device))) for at in starts
        ]
    return sum(losses) / len(losses)


def load_trainable(folder: Path, device: str) -> Any:
    """The checkpoint in float32 on a device. Raises YarnEdgeError."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise YarnEdgeError("training needs transformers: pip install 'yarn-edge[hf]'") from error
    if device == "cuda" and not torch.cuda.is_available():
        raise YarnEdgeError("--device cuda: torch finds no CUDA device")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, attn_implementation="sdpa"
        )
    except Exception as error:  # many libraries raise many kinds
        raise YarnEdgeError(f"{folder}: transformers cannot load it: {one_line(str(error), 300)}") from error
    scaling = getattr(model.config, "rope_parameters", None) or {}
    if scaling.get("rope_type") != "yarn":
        raise YarnEdgeError(f"{folder}/config.json: has no YaRN scaling to train with")
    return model.to(device)


def token_tensor(folder: Path, text: Path, least: int) -> tuple[Any, Any]:
    """The text's tokens, (for training, held out). Raises YarnEdgeError if at most `least` tokens are held out."""
    import torch
    from tokenizers import Tokenizer

    read = read_text(text)
    ids = torch.tensor(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(read, add_special_tokens=False).ids)
    cut = len(ids) - int(HELD_OUT * len(ids))
    if len(ids) - cut <= least:
        raise YarnEdgeError(f"{text}: has {len(ids)} tokens, but a tenth of them must be more than --length {least}")
    return ids[:cut], ids[cut:]


def save(model: Any, checkpoint: Path, folder: Path, record: dict[str, Any]) -> None:
    """Write weights, config, tokenizer and training.json. The folder gets its name when it is complete."""
    with partial_folder(folder) as partial:
        model.save_pretrained(partial)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(checkpoint / name, partial / name)
        (partial / "training.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
        publish_folder(partial, folder, force=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, the text and the recipe."""
    add = parser.add_argument
    add(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="folder of a checkpoint with a YaRN block in its config.json",
    )
    add("--text", type=Path, required=True, metavar="FILE", help="text to train on")
    add("-o", "--output", type=Path, required=True, metavar="FOLDER", help="folder to write")
    add("--length", type=length, default=32768, metavar="N", help="tokens of a window (default: 32k)")
    add("--steps", type=count(1, 10**6), default=200, metavar="N", help="steps to train (default: 200)")
    add("--batch", type=count(1, 4096), default=1, metavar="N", help="windows of a step (default: 1)")
    add("--learning-rate", type=float, default=LEARNING_RATE, metavar="R", help="after the warm-up (default: 2e-5)")
    add("--seed", type=count(0, 2**31 - 1), default=0, metavar="N", help="seed of the windows (default: 0)")
    add("--device", choices=("cpu", "cuda"), default="cuda", help="where to train (default: cuda)")


def run(args: argparse.Namespace) -> int:
    """Train and write the folder."""
    recipe = TrainingRecipe(args.length, args.steps, args.batch, args.learning_rate, args.seed, args.device)
    if args.output.exists():
        raise YarnEdgeError(f"{args.output}: already exists")
    model = load_trainable(args.checkpoint, recipe.device)
    tokens, held_out = token_tensor(args.checkpoint, args.text, recipe.length)
    results = train(model, tokens, held_out, recipe)
    record = {**asdict(recipe), "betas": BETAS, "warm_up": WARM_UP, "text": args.text.name, **results}
    save(model, args.checkpoint, args.output, record)
    note(
        f"held-out loss {results['held_out_before']:.4f} -> {results['held_out_after']:.4f} nats per token, "
        f"{len(results['losses'])} steps in {results['seconds']:.0f} s"
    )
    return 0


def main() -> int:
    """Returns 2 for bad input, 130 for Ctrl-C."""
    what = "Fine-tune a checkpoint with the YaRN block of its config."
    return run_module("evidence.yarn_finetune", what, add_arguments, run)


if __name__ == "__main__":
    raise SystemExit(main())
