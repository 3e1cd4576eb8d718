"""A GGUF as a model of the harness: its three kinds of requests, tokens, and chat templates, answered as its own HFLM does.

HFLM (lm_eval/models/huggingface.py) decides what the numbers mean: how an input that is too long is cut, what precedes the first
token, which tokens of a text are special. The same decisions are made here for llama.cpp.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, warning_once
from tqdm import tqdm

from yarn_edge import __version__
from yarn_edge.chat.template import ChatTemplate, Message
from yarn_edge.errors import YarnEdgeError
from yarn_edge.graph.opening import open_context
from yarn_edge.likelihood import Rows
from yarn_edge.runtime.llama_api import physical_threads
from yarn_edge.runtime.model import Model

from .arguments import parse_arguments, parse_generation
from .requests import Requests, Tokens, in_order

DEFAULT_CTX = 8192  # inputs of the tasks are shorter, and a long-context model's full context may not fit into memory
MAX_GEN_TOKS = 256  # HFLM's default for tasks that set none
_HARNESS_FLAGS = ("batch_size", "max_batch_size", "device", "trust_remote_code")
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # how transformers (utils/chat_template_utils.py) finds the end of a message
# A child of the harness's own logger, so that its handler and its --verbosity apply.
_log = logging.getLogger("lm_eval.models.yarn_edge")


class YarnEdgeLM(TemplateLM):  # type: ignore[misc]
    """A GGUF in the harness; the keyword arguments are its --model_args. `close`, or dropping the object, frees the model.

    path: a file, or a variant of it (`model.gguf@kv=q4_0`); kv_type, backend and yarn_… are the same as separate arguments.
    ctx: maximum input in tokens (default: the context that the model was trained on, at most 8192); batch: tokens per call of
    llama.cpp (default: 512); threads. flash_attention: auto, on or off. add_bos_token: overrides the file.
    prefix_token_id: the token that precedes a text (default: BOS, else EOS). batch_size, max_batch_size, device and
    trust_remote_code come from the harness's own flags and have no effect: requests run one at a time, on `backend`.
    Raises YarnEdgeError, also for unknown arguments.
    """

    def __init__(self, path: str | None = None, **arguments: Any) -> None:
        super().__init__()
        flags = {name: arguments.pop(name, None) for name in _HARNESS_FLAGS}
        # "cuda:0" is the default of the harness's --device.
        if str(flags["batch_size"]) not in ("None", "1") or flags["device"] not in (None, "cpu", "cuda:0"):
            _log.warning("requests run one at a time, on backend=: --batch_size and --device have no effect")
        wanted = parse_arguments({"path": path, **arguments})
        self.variant = wanted.variant
        with ExitStack() as stack:
            self._model: Model = stack.enter_context(self.variant.load())
            self._max_length = wanted.ctx or min(self._model.n_ctx_train, DEFAULT_CTX)
            settings = self.variant.settings(
                n_ctx=self._max_length, n_batch=wanted.batch, threads=wanted.threads, attention=wanted.flash_attention
            )
            context = stack.enter_context(open_context(self._model, settings))
            self._flash_attention = wanted.flash_attention
            rows = stack.enter_context(Rows(wanted.threads or physical_threads()))
            self.requests = Requests(context, rows)
            bos = _bos(self._model)
            self._prefix = next(t for t in (wanted.prefix_token_id, bos, self._model.eos) if t is not None)
            self._add_bos = self._model.add_bos if wanted.add_bos_token is None else wanted.add_bos_token
            if self._add_bos and bos is None:
                raise YarnEdgeError(f"{self._model.path}: has no BOS token, so add_bos_token=True is not possible")
            if not 0 <= self._prefix < self._model.n_vocab:
                raise YarnEdgeError(
                    f"{self._model.path}: there is no token {self._prefix}: give another prefix_token_id"
                )
            self._template: ChatTemplate | None = None
            self._held = stack.pop_all()
        self._finalizer = weakref.finalize(self, self._held.close)

    def close(self) -> None:
        """Free the model. It answers no requests after that."""
        self._finalizer()

    @property
    def eot_token_id(self) -> int:
        """The model's EOS."""
        return self._model.eos

    @property
    def prefix_token_id(self) -> int:
        """The token that precedes a text: BOS, or EOS in models without BOS."""
        return self._prefix

    @property
    def max_length(self) -> int:
        """Maximum length of an input in tokens."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """Maximum length of an answer in tokens, for tasks that set none."""
        return MAX_GEN_TOKS

    @property
    def tokenizer_name(self) -> str:
        """The file: a part of the names of the harness's request caches."""
        return str(self._model.path.resolve()).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What was run, for "config" in the results."""
        context = self.requests.context
        return {
            "model_path": str(self._model.path),
            "model_ctx": self._max_length,
            "model_kv_type": context.kv_type,
            "model_backend": self.variant.backend,
            "model_flash_attention": self._flash_attention,
            "model_scaling": asdict(context.arguments) | dict(self.variant.overrides),
            "yarn_edge_version": __version__,
            "llama_cpp_version": self._model.api.__version__,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_unused: Any) -> list[int]:
        """Token ids. Names of special tokens in the text become those tokens, as in transformers.

        One BOS at the beginning if the model uses it, unless add_special_tokens is False; never an EOS.
        """
        tokens = self._model.tokenize(string, add_special=False, parse_special=True)
        if self._add_bos and add_special_tokens is not False and tokens[:1] != [self._model.bos]:
            return [self._model.bos, *tokens]
        return tokens

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_unused: Any,
    ) -> list[tuple[float, bool]]:
        room = self._max_length + 1  # the last token is predicted, not read
        inputs: list[Tokens] = []
        for _, context, continuation in requests:
            if not context or not 0 < len(continuation) <= self._max_length:
                raise YarnEdgeError(
                    f"a request with a context of {len(context)} and a continuation of {len(continuation)} tokens: neither may be "
                    f"empty, and the continuation must fit into ctx={self._max_length}"
                )
            inputs.append(np.array((context + continuation)[-room:], np.int32))
        longer = [len(c) + len(k) for _, c, k in requests if len(c) + len(k) > room]
        if longer:
            text = "%d of %d inputs are longer than ctx=%d tokens (the longest has %d): their beginning is cut off"
            _log.warning(text, len(longer), len(requests), self._max_length, max(longer) - 1)
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for i in self._progress(in_order(inputs), "Running loglikelihood requests", disable_tqdm):
            words, _, continuation = requests[i]
            scores[i] = self.requests.score(inputs[i], len(continuation))
            if words is not None:  # else it is a window of loglikelihood_rolling, which has an entry of its own
                self.cache_hook.add_partial("loglikelihood", words, scores[i])
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text in nats, in windows of `max_length` tokens that are cut as in HFLM."""
        windows: list[tuple[None, list[int], list[int]]] = []
        ends: list[int] = []
        for (text,) in (request.args for request in requests):
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self._prefix, max_seq_len=self._max_length, context_len=1
            )
            windows += [(None, *make_disjoint_window(window)) for window in cut]
            ends.append(len(windows))
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        sums = []
        for request, start, end in zip(requests, [0, *ends], ends, strict=False):
            sums.append(float(sum(log_prob for log_prob, _ in scores[start:end])))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, sums[-1])
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt, up to the first text of `until`, the model's own end, or max_gen_toks."""
        wanted = [parse_generation(gen_kwargs, MAX_GEN_TOKS) for _, gen_kwargs in (r.args for r in requests)]
        inputs, longer = [], 0
        for request, generation in zip(requests, wanted, strict=True):
            tokens = self.tok_encode(request.args[0]) or [self._prefix]
            room = self._max_length - generation.max_tokens
            if room < 1:
                raise YarnEdgeError(
                    f"an answer of max_gen_toks={generation.max_tokens} tokens leaves no room for the prompt: use a ctx "
                    f"above {self._max_length}, or a smaller max_gen_toks"
                )
            longer += len(tokens) > room
            inputs.append(np.array(tokens[-room:], np.int32))
        if longer:
            text = (
                "%d of %d prompts with their answers are longer than ctx=%d tokens: the prompts' beginning is cut off"
            )
            _log.warning(text, longer, len(requests), self._max_length)
        answers = [""] * len(requests)
        for i in self._progress(in_order(inputs), "Running generate_until requests", disable_tqdm):
            how = wanted[i]
            answers[i] = self.requests.generate(inputs[i], how.sampling, how.max_tokens, how.stops)
            self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
        return answers

    def _progress(self, order: Sequence[int], label: str, disabled: bool) -> Iterator[int]:
        given, evaluated = self.requests.n_given, self.requests.n_evaluated
        yield from tqdm(order, desc=label, disable=disabled)
        given, evaluated = self.requests.n_given - given, self.requests.n_evaluated - evaluated
        _log.info("%s: %d tokens evaluated for inputs of %d", label, evaluated, given)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The file's template, for the results and the caches. Raises YarnEdgeError if there is none, or for another name."""
        if not chat_template:
            return None
        if isinstance(chat_template, str) and chat_template != "default":
            raise YarnEdgeError(f"--apply_chat_template {chat_template}: only the file's default template is known")
        if self._model.chat_template is None:
            raise YarnEdgeError(f"{self._model.path}: has no tokenizer.chat_template: leave out --apply_chat_template")
        return self._model.chat_template

    def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The messages as text, up to the answer, or with the last message left open.

        The system message is left out if the template does not support it, as in HFLM.
        """
        try:
            return self._render(chat_history, add_generation_prompt)
        except YarnEdgeError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            warning_once(_log, f"the chat template failed ({error}): the system message is left out")
            return self._render(others, add_generation_prompt)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        if self._template is None:
            self.chat_template(True)
            self._template = self._held.enter_context(
                ChatTemplate.of(self._model, remedy="leave out --apply_chat_template")
            )
        if add_generation_prompt:
            return self._template.render(messages)
        last = {**messages[-1], "content": messages[-1]["content"] + _TAG}
        text = self._template.render([*messages[:-1], last], add_generation_prompt=False)
        end = text.rfind(_TAG.rstrip())
        if end < 0:
            raise YarnEdgeError(f"{self._template.origin}: drops the beginning of the answer (gen_prefix)")
        return text[:end] if text.startswith(_TAG, end) else text[:end].rstrip()


def _bos(model: Model) -> int | None:
    # llama.cpp invents one (token 11) for GPT-2-style tokenizers that have none, such as Qwen's.
    meta = model.gguf.metadata
    return model.bos if "tokenizer.ggml.bos_token_id" in meta or meta.get("tokenizer.ggml.model") == "llama" else None
