"""`make fuzz`: hostile inputs of every kind, and a record."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from yarn_edge.flags import TRUST

from support.fuzz.kinds import KINDS
from support.fuzz.runner import Failure, run


def main() -> int:
    """Fuzz, print the record, 1 if anything failed."""
    parser = argparse.ArgumentParser(description="Hostile inputs through everything that reads them.")
    parser.add_argument("--inputs", type=int, default=100_000, help="of all kinds together")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this kind (may be repeated)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input, to repeat one")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    os.environ[TRUST] = "1"  # `loads` has a first load of its own
    out = sys.stdout.write
    chosen = args.kind or list(KINDS)
    whole = sum(KINDS[name][1] for name in chosen)
    failures: list[Failure] = []
    for name in chosen:
        scratch = Path(
            tempfile.mkdtemp(prefix="yarn-edge-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        )
        try:
            make, part = KINDS[name]
            n_inputs = max(1, round(args.inputs * part / whole))
            began = time.monotonic()
            counts, failed, longest = run(make(scratch), n_inputs, args.seed, scratch, args.workers, args.first)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        outcomes = ", ".join(f"{what} {n}" for what, n in counts.most_common())
        out(f"{name}: {n_inputs} inputs in {time.monotonic() - began:.0f} s, the longest {longest:.2f} s: {outcomes}\n")
        out("".join(f"  input {f.number}: {f.what}\n" for f in failed[:20]))
        sys.stdout.flush()
        failures += failed
    out(f"seed {args.seed}: {len(failures)} failures\n")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
