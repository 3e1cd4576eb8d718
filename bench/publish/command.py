"""`yarn-edge publish`: measures the GGUFs of a folder, writes a model card of what was measured, and uploads both if told to."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict
from pathlib import Path

from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import add_threads_flag, add_trust_flag, length_from
from yarn_edge.hub.reference import HubReference, parse_reference
from yarn_edge.hub.upload import existing_repository, readme_of, upload
from yarn_edge.progress import note
from yarn_edge.stdout import write_json, write_text

from .card import MARK, CardSettings, card
from .measured import Measurement, OpenFiles, measure_models, models_in, widest

BUNDLED = "the bundled text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge publish`."""
    add = parser.add_argument
    add("folder", metavar="DIR", type=Path, help="folder with the GGUFs to publish")
    add("target", metavar="hf:ORG/NAME", help="the repository, made if there is none")
    add("--upload", action="store_true", help="upload (default: print the card, and upload nothing)")
    add("--private", action="store_true", help="make a new repository private")
    add("--force", action="store_true", help="replace a model card that yarn-edge did not write")
    add("--against", metavar="CHECKPOINT", help="verify the files against this checkpoint (a folder or hf:ORG/NAME)")
    add(
        "--base",
        metavar="BASE.gguf",
        help="measure KL divergence from this GGUF (default: the one here with the most bits, from 16)",
    )
    add("--text", metavar="PATH", help="measure on this text, as perplexity does (default: the bundled text)")
    add("--ctx", type=length_from(2), default=2048, metavar="N", help="tokens per window (default: %(default)s)")
    add("--max-tokens", type=length_from(2), metavar="N", help="measure on at most N tokens (default: all)")
    add("--no-quality", action="store_true", help="measure neither perplexity nor KL divergence; the card states none")
    add("--base-model", default="", metavar="ORG/NAME", help="the model that these files were made from, for the Hub")
    add("--license", default="", metavar="ID", help="the license, as the Hub names it, such as apache-2.0")
    add("--json", action="store_true", help="print a JSON object")
    add_threads_flag(parser)
    add_trust_flag(parser)


def run(args: argparse.Namespace) -> int:
    """`yarn-edge publish`."""
    target = parse_reference(args.target)
    if target.file:
        raise YarnEdgeError(f"{target}: is a repository to publish to: leave :{target.file} out")
    found = models_in(args.folder)
    if args.upload:
        _check_card(target, args.force)
    from_floats = widest(found)
    base = args.base or (str(from_floats.path) if from_floats else None)
    how = Measurement(
        args.against, base, args.text, args.ctx, args.max_tokens, args.threads, quality=not args.no_quality
    )
    held = OpenFiles()
    models = measure_models(found, how, held)
    settings = CardSettings(
        target,
        args.base_model,
        args.license,
        _without_folders(args.command_line),
        Path(args.against).name if args.against else "",
        Path(args.text).name if args.text else BUNDLED,
        Path(base).name if base else "",
    )
    text = card(settings, models)
    held.check_unchanged()
    sha256 = {name: sha for model in models for name, sha in model.sha256.items()}
    address = ""
    if args.upload:
        files = [path for model in models for path in model.gguf.shards]
        address = upload(target, {"README.md": text}, files, sha256, private=args.private)
        note(f"note: {target}: published as {address}")
    else:
        note(f"note: nothing was uploaded: --upload puts README.md and {len(sha256)} files into {target}")
    if args.json:
        rows = [
            {
                "files": model.sha256,
                "bytes": model.n_bytes,
                "portable": model.portable,
                "checks": [asdict(check) for check in model.checks],
                "curve": [{"ctx": n, "ppl": ppl} for n, ppl in model.curve],
                "kld_mean": model.kld,
                "top1": model.top1,
            }
            for model in models
        ]
        write_json({"target": str(target), "uploaded": bool(address), "commit": address, "card": text, "models": rows})
    elif not args.upload:
        write_text(text)
    return 0


def _without_folders(command_line: str) -> str:
    """The command for the card: files by their names alone, because where they lie is nobody's business."""
    words = (word for word in shlex.split(command_line) if word != "--debug")
    return shlex.join(Path(word).name if "/" in word and Path(word).exists() else word for word in words)


def _check_card(target: HubReference, force: bool) -> None:
    """Before anything is measured: the card that is there must be ours, or may be replaced."""
    repository = existing_repository(target)
    if repository is None or force:
        return
    there = readme_of(repository)
    if there and MARK not in there:
        raise YarnEdgeError(f"{target}: has a README.md that yarn-edge did not write: --force replaces it")
