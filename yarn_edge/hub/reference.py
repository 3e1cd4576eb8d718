"""What a user writes for a repository of the Hub: `hf:ORG/NAME[@REV][:FILE]`, where FILE is a quantization or a file's name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from yarn_edge.errors import YarnEdgeError, one_line

SCHEME = "hf:"
_PART = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_FORM = re.compile(rf"hf:(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[\w./-]+))?(?::(?P<file>[^:@]+))?", re.ASCII)


@dataclass(frozen=True)
class HubReference:
    """A repository of models. revision: a branch, a tag or a commit. file: after the colon, "" if nothing is."""

    repo: str
    revision: str = "main"
    file: str = ""

    def __str__(self) -> str:
        """As the user writes it."""
        at = "" if self.revision == "main" else f"@{self.revision}"
        return f"{SCHEME}{self.repo}{at}" + (f":{self.file}" if self.file else "")


def is_reference(value: object) -> bool:
    """Whether a command's argument names a repository of the Hub."""
    return str(value).startswith(SCHEME)


def parse_reference(value: object) -> HubReference:
    """The repository that an argument names. Raises YarnEdgeError for any other form."""
    match = _FORM.fullmatch(str(value))
    if match is None or ".." in match["repo"] or "--" in match["repo"] or ".." in (match["revision"] or ""):
        raise YarnEdgeError(f"{one_line(str(value), 200)}: is not hf:ORG/NAME[@REVISION][:FILE]")
    return HubReference(match["repo"], match["revision"] or "main", match["file"] or "")
