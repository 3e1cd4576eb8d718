"""The positions of a GGUF as one value, made from a header that is read once and then handed on.

There are three descriptions of a file: *declared* (the keys of `{arch}.rope.*`, read literally), *wanted* (the file's own
description in `yarn_edge.rope.*`, or declared if it has none), and *effective* (what llama.cpp computes, by its rules).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.llama_rules.angle_error import AngleError, angle_error, worse
from yarn_edge.llama_rules.declared import declared
from yarn_edge.llama_rules.description import SLIDING, canonical, canonical_sliding, is_live
from yarn_edge.llama_rules.effective import (
    FROM_MODEL,
    LLAMA_CLASS_DEFAULTS,
    ROPE_SCALING_TYPES,
    LivePositions,
    RuntimeArguments,
    as_table,
    ratio_in_file,
    spelled_out,
)
from yarn_edge.llama_rules.frequency_tables import chosen_table, file_frequency_factors
from yarn_edge.llama_rules.honoured import HONOURED, LONG_FACTORS, SHORT_FACTORS, honoured
from yarn_edge.llama_rules.layers import running, running_sliding
from yarn_edge.positions.scaling import RopeScaling


@dataclass(frozen=True, eq=False)
class FilePositions:
    """What a GGUF says about its positions, and what runs. Each value is computed when it is first used.

    n_ctx: the size of the context, by which llama.cpp chooses one of LongRoPE's two tables; None if it is not known.
    Every property raises YarnEdgeError if the file cannot be judged: an unknown architecture or scaling type, values that make
    no sense, or tables whose choice depends on the context.
    """

    file: GGUFFile
    n_ctx: int | None = None

    def at(self, n_ctx: int | None) -> FilePositions:
        """The same file in a context of `n_ctx` tokens."""
        return FilePositions(self.file, n_ctx)

    @cached_property
    def declared(self) -> RopeScaling:
        """The keys of `{arch}.rope.*`, read literally."""
        return declared(self.file, self.n_ctx)

    @cached_property
    def canonical(self) -> RopeScaling | None:
        """The file's own description in `yarn_edge.rope.*`, None if it has none."""
        return canonical(self.file)

    @property
    def wanted(self) -> RopeScaling:
        """What the file's positions are meant to be: its own description if it has one, else what it declares."""
        return self.declared if self.canonical is None else self.canonical

    @cached_property
    def canonical_sliding(self) -> RopeScaling | None:
        """The file's own description of layers with a sliding window, None if it has none."""
        sliding = canonical_sliding(self.file)
        if sliding is not None and honoured(self.file.architecture).sliding is None:
            raise YarnEdgeError(
                f"{self.file.path}: has {SLIDING}*, but architecture {self.file.architecture} has no layers with a sliding window"
            )
        return sliding

    @property
    def own_sliding(self) -> RopeScaling | None:
        """`canonical_sliding` if it is not that of full attention."""
        sliding, full = self.canonical_sliding, self.canonical
        return sliding if sliding is not None and full is not None and sliding.differences(full) else None

    @cached_property
    def live(self) -> LivePositions | None:
        """What the live graph must be given for the file to run as described; None if its keys and arguments are enough."""
        if not is_live(self.file):
            return None
        honoured(self.file.architecture)
        assert self.canonical is not None
        sliding = self.canonical_sliding
        if sliding is None:  # then windows follow full attention, if they do so in llama.cpp
            plain, windows = self.effective(), self.effective_sliding(FROM_MODEL)
            sliding = self.canonical if windows and not angle_error(windows, plain).any_difference else None
        return LivePositions(as_table(self.canonical), None if sliding is None else as_table(sliding))

    def effective(self, arguments: RuntimeArguments = FROM_MODEL) -> RopeScaling:
        """What is computed for this file in a context made with `arguments`, by llama.cpp's rules, then by `arguments.live`."""
        return running(self.file, arguments, self._frequency_factors)

    def effective_sliding(self, arguments: RuntimeArguments) -> RopeScaling | None:
        """`effective` for layers with a sliding window; None if there are none."""
        return running_sliding(self.file, arguments, self._frequency_factors)

    @cached_property
    def _frequency_factors(self) -> tuple[float, ...] | None:
        return file_frequency_factors(self.file, self.n_ctx)

    def error(self, arguments: RuntimeArguments = FROM_MODEL) -> AngleError:
        """How far the positions that run with `arguments` are from the wanted ones, in the worst layer that is described."""
        error, wanted = angle_error(self.effective(arguments), self.wanted), self.canonical_sliding
        sliding = None if wanted is None else self.effective_sliding(arguments)
        return error if wanted is None or sliding is None else worse(error, angle_error(sliding, wanted))

    @cached_property
    def explicit_arguments(self) -> RuntimeArguments:
        """Arguments that make the file run as wanted, with every scaling value spelled out so that no default can change it.

        These are the file's own values if it runs as wanted by itself, else the values that come closest to what is wanted.
        Architectures outside the table and files whose LongRoPE cannot be judged get "from the model", which claims nothing.
        """
        file = self.file
        if self.live is not None:
            return replace(spelled_out(self.effective(), ratio_in_file(file)), live=self.live)
        has_tables = LONG_FACTORS in file.tensors or SHORT_FACTORS in file.tensors
        if file.architecture not in HONOURED or (has_tables and chosen_table(file, self.n_ctx) is None):
            return FROM_MODEL
        sides = (self.effective(), self.wanted, self.declared)
        ways = [spelled_out(side, ratio_in_file(file)) for side in sides if side.method in ROPE_SCALING_TYPES]

        def distance(arguments: RuntimeArguments) -> float:
            error = self.error(arguments)
            return error.frequency + error.attention if error.any_difference else 0.0

        return min(ways, key=distance)  # among equals the first: the file's own values

    @property
    def runs(self) -> RopeScaling:
        """What llama.cpp computes when yarn-edge loads the file, with the explicit arguments."""
        return self.effective(self.explicit_arguments)

    @cached_property
    def llama_class_arguments(self) -> dict[str, Any] | None:
        """Keyword arguments with which a plain `llama_cpp.Llama(path, **kwargs)` runs what the file wants.

        {} if its defaults are enough, None if no arguments can do it.
        """
        if not self.error(LLAMA_CLASS_DEFAULTS).any_difference:
            return {}
        if self.live is not None or self.error(self.explicit_arguments).any_difference:
            return None
        plain = LLAMA_CLASS_DEFAULTS.context_params
        return {name: value for name, value in self.explicit_arguments.context_params.items() if value != plain[name]}

    def with_metadata(self, overrides: Mapping[str, Any]) -> FilePositions:
        """The positions of the file as the runtime sees it with `overrides` for its metadata."""
        file = replace(self.file, metadata={**self.file.metadata, **overrides}) if overrides else self.file
        return FilePositions(file, self.n_ctx) if overrides else self
