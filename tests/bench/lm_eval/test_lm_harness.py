"""lm-evaluation-harness with our models. The truth is its own HFLM, with the same requests on the checkpoint."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

import yarn_edge.bench.lm_eval.harness
from yarn_edge.bench.lm_eval.arguments import parse_arguments, parse_generation
from yarn_edge.bench.lm_eval.model import YarnEdgeLM
from yarn_edge.bench.lm_eval.requests import in_order
from yarn_edge.chat.template import ChatTemplate
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.errors import YarnEdgeError

from support import tiny
from support.tiny_tokenizers import save, sentence_model

NEAR = 1e-3  # nats, of one request
FLASH_NEAR = 2e-2  # flash attention rounds to half precision internally
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
FACTS = [
    {"text": "The capital of France is", "options": ["Paris", "a river in Asia", "Rome"], "right": 0},
    {"text": "Water is made of oxygen and", "options": ["iron", "hydrogen", "gold"], "right": 1},
    {"text": "The sun rises in the", "options": ["west", "cellar", "east"], "right": 2},
    {"text": "A week has", "options": ["seven days", "nine days", "seven months"], "right": 0},
    {"text": "Dogs are", "options": ["metals", "animals", "numbers"], "right": 1},
    {"text": "Ice is frozen", "options": ["sand", "fire", "water"], "right": 2},
]
PSALM = "The LORD is my shepherd; I shall not want. He maketh me to lie down in green pastures. " * 4
TASKS = {
    "facts": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{options}}"
doc_to_target: right
num_fewshot: 2
fewshot_split: train
fewshot_config: {sampler: first_n}
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "facts_told": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{options[right]}}"
generation_kwargs: {until: [".", "\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
""",
    "psalm": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{psalm}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to look up or reach a host fails."""

    def refused(*_args: object, **_kwargs: object) -> Any:
        raise AssertionError("a test reached for the network")

    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three tasks with their data."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{**fact, "psalm": PSALM[i:]} for i, fact in enumerate(FACTS)]
    data = {"train": rows[:2], "test": rows[2:]}
    for name, part in data.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    files = {name: str(folder / f"{name}.jsonl") for name in data}
    for name, text in TASKS.items():
        given = {"data_files": files, "cache_dir": str(folder / "cache")}
        split = "test" if name == "facts" else "train"
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(given)}\ntest_split: {split}\n"
        (folder / f"{name}.yaml").write_text(head + text.lstrip())
    return folder


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its GGUF: random weights, a tokenizer like Llama 2's, with BOS and a space before every text."""
    own = sentencepiece.SentencePieceProcessor(model_proto=sentence_model())
    vocab = {own.id_to_piece(i): i for i in range(700)}
    merges = []
    for piece in sorted(
        (p for p in vocab if len(p) > 1 and not p.startswith("<")), key=lambda p: -own.get_score(vocab[p])
    ):
        halves = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += sorted((h for h in halves if set(h) <= vocab.keys()), key=lambda h: (vocab[h[0]], vocab[h[1]]))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder = tiny.write_checkpoint(tmp_path_factory.mktemp("spm") / "ck", vocab_size=704)
    save(folder, tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return folder, convert(folder, str(folder.parent / "spm.gguf"), "F32")[0]


@pytest.fixture(scope="module")
def smol(smol_quants: dict[str, Path]) -> Iterator[YarnEdgeLM]:
    """SmolLM2 at Q8_0 in 256 tokens, batches of 16."""
    lm = YarnEdgeLM(str(smol_quants["Q8_0"]), ctx=256, batch=16, kv_type="f32", threads=1)
    yield lm
    lm.close()


def hflm(checkpoint: Path, max_length: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(checkpoint), dtype="float32", device="cpu", max_length=max_length)


def request(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def evaluated(tasks: Path, model: Any, **more: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return dict(simple_evaluate(model=model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, **more))


def test_the_harness_finds_the_same_as_on_the_checkpoint(
    tasks: Path, whole_smol_checkpoint: Path, whole_smol_f32: Path
) -> None:
    words = f"path={whole_smol_f32},ctx=64,kv_type=f32,flash_attention=off,threads=1"  # the psalm takes two windows
    ours = evaluated(tasks, "yarn_edge", model_args=words)
    truth = evaluated(tasks, hflm(whole_smol_checkpoint, 64))
    assert ours["config"]["model_kv_type"] == "f32"
    assert ours["config"]["model_scaling"]["yarn_orig_ctx"] == 8192
    for mine, theirs in zip(ours["samples"]["facts"], truth["samples"]["facts"], strict=True):
        assert mine["arguments"] == theirs["arguments"]
        for ((log_prob, greedy),), ((true_log_prob, true_greedy),) in zip(mine["resps"], theirs["resps"], strict=True):
            assert log_prob == pytest.approx(true_log_prob, abs=NEAR)
            assert greedy == true_greedy
    for mine, theirs in zip(ours["samples"]["psalm"], truth["samples"]["psalm"], strict=True):
        assert mine["resps"][0][0] == pytest.approx(theirs["resps"][0][0], abs=NEAR * 10)  # of 90 tokens
    answers = [sample["resps"] for sample in ours["samples"]["facts_told"]]
    assert answers == [sample["resps"] for sample in truth["samples"]["facts_told"]]
    assert all(text for ((text,),) in answers)
    for name in ("acc,none", "acc_norm,none"):
        assert ours["results"]["facts"][name] == truth["results"]["facts"][name] >= 0.5
    assert ours["results"]["facts_told"]["exact_match,none"] == truth["results"]["facts_told"]["exact_match,none"]


def test_bos_prefix_truncation_and_odd_texts_as_in_hflm(
    spm: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    ours, truth = YarnEdgeLM(str(spm[1]), ctx=32, kv_type="f32", threads=1), hflm(spm[0], 32)
    assert ours.tok_encode("The year") == truth.tok_encode("The year") == [1, *ours.tok_encode("The year", False)]
    assert ours.tok_encode("<s>The year") == truth.tok_encode("<s>The year")
    assert ours.tok_encode("<s>The year", True).count(1) == 1
    assert (ours.prefix_token_id, ours.eot_token_id) == (truth.prefix_token_id, truth.eot_token_id)
    pairs = [("The year 1901", " had 3 days"), ("", "Hello"), ("<s>We", " say"), ("The year ", "1902"), ("", "<s>We")]
    pairs += [("They say more. " * 20, "We'll say it's"), ("We" * 8, " " + "Καλημέρα 😀 " * 3)]
    pairs += [("They say more. " * 20, " no")] * 2
    found = ours.loglikelihood([request("loglikelihood", *pair) for pair in pairs])
    wanted = truth.loglikelihood([request("loglikelihood", *pair) for pair in pairs])
    np.testing.assert_allclose(
        [log_prob for log_prob, _ in found], [log_prob for log_prob, _ in wanted], atol=FLASH_NEAR
    )
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    warnings = [r.getMessage() for r in caplog.records if r.name == "lm_eval.models.yarn_edge"]
    assert warnings == [
        f"3 of 9 inputs are longer than ctx=32 tokens (the longest has {len(ours.tok_encode(''.join(pairs[5]))) - 1}): their beginning is cut off"
    ]
    texts = ["", "We", "The year 1901 had 3 days, and more. " * 6]
    rolled = [lm.loglikelihood_rolling([request("loglikelihood_rolling", t) for t in texts]) for lm in (ours, truth)]
    np.testing.assert_allclose(*rolled, atol=FLASH_NEAR, rtol=1e-4)
    asked = [
        ("The year", {"max_gen_toks": 9}),
        ("They say more. " * 20, {"max_gen_toks": 5, "until": "x"}),
        ("", {"max_gen_toks": 3}),
    ]
    said = [lm.generate_until([request("generate_until", *a) for a in asked[:2]]) for lm in (ours, truth)]
    assert said[0] == said[1]
    assert ours.generate_until([request("generate_until", *asked[2])])[0]
    with pytest.raises(YarnEdgeError, match="a continuation of 107 tokens"):
        ours.loglikelihood([request("loglikelihood", "a", "They say more. " * 15)])
    with pytest.raises(YarnEdgeError, match="max_gen_toks=32 tokens leaves no room"):
        ours.generate_until([request("generate_until", "a", {"max_gen_toks": 32})])
    plain = YarnEdgeLM(str(spm[1]), ctx=32, add_bos_token=False, prefix_token_id=5)
    assert plain.tok_encode("We", True) == ours.tok_encode("We", False)
    assert plain.prefix_token_id == 5


def test_what_the_cache_keeps_changes_no_result(smol: YarnEdgeLM) -> None:
    prompt = "Twelve men went to the river. " * 5
    answers = [
        " They",
        " They swam",
        " They swam home",
        " They ran",
        " He",
        " They swam",
        " It was cold and late and dark",
    ]
    pairs = [(prompt + "What then?", a) for a in answers] + [(prompt + "Who?", a) for a in answers]
    pairs += [(prompt + "Who? Twelve", " men"), (prompt, "What then? They swam"), ("", "Twelve men"), ("Other", " men")]
    pairs.append(("None", " so long as this: " + prompt))  # more rows than are kept, and several batches
    random.Random(1).shuffle(pairs)
    requests = [request("loglikelihood", *pair) for pair in pairs]
    smol.requests.n_given = smol.requests.n_evaluated = 0
    together = smol.loglikelihood(requests)
    assert smol.requests.n_evaluated < 0.25 * smol.requests.n_given
    alone = []
    for one in requests:
        smol.requests.forget()
        alone += smol.loglikelihood([one], disable_tqdm=True)
    np.testing.assert_allclose([p for p, _ in together], [p for p, _ in alone], atol=NEAR)
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]
    asked = [
        request("generate_until", prompt + end, {"max_gen_toks": 8}) for end in ("Then", "They", "Then", "Then they")
    ]
    said = smol.generate_until(asked)
    apart = []
    for one in asked:
        smol.requests.forget()
        apart += smol.generate_until([one])
    assert said == apart
    after = request("loglikelihood", asked[-1].args[0] + said[-1] + " and", " then they slept")
    smol.generate_until(asked[-1:])
    continued = smol.loglikelihood([after])  # with what the answer left in the cache
    smol.requests.forget()
    assert continued == pytest.approx(np.array(smol.loglikelihood([after])), abs=NEAR)
    assert smol.loglikelihood(requests[:3]) == pytest.approx(np.array(together[:3]), abs=NEAR)


def test_order_puts_common_beginnings_together() -> None:
    rows = [[300, 2], [2, 300], [2], [300], [2, 300, 1], [2, 4]]
    assert in_order([np.array(row, np.int32) for row in rows]) == [2, 5, 1, 4, 3, 0]


def test_one_token_answers_take_no_evaluation(smol: YarnEdgeLM) -> None:
    smol.requests.forget()
    pairs = [("Question: is ice cold? A. yes B. no\nAnswer:", f" {letter}") for letter in "ABCD"]
    smol.requests.n_evaluated = 0
    found = smol.loglikelihood([request("loglikelihood", *pair) for pair in pairs])
    assert smol.requests.n_evaluated == len(smol.tok_encode(pairs[0][0]))
    assert len({log_prob for log_prob, _ in found}) == 4


def scripted(lm: YarnEdgeLM, tokens: list[int], gen_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """The answer of a model that says `tokens`."""
    script = iter(tokens)
    with monkeypatch.context() as patch:
        patch.setattr(lm.requests.context, "sample", lambda _chain: next(script))
        return str(lm.generate_until([request("generate_until", "We say", {"max_gen_toks": 32, **gen_kwargs})])[0])


def test_stops_and_characters_across_tokens(smol: YarnEdgeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(text: str, **gen_kwargs: Any) -> str:
        tokens = smol.tok_encode(text)
        return scripted(smol, [*tokens, smol.eot_token_id], gen_kwargs, monkeypatch)

    smile = "a 🦙 b"
    assert len(smol.tok_encode(smile)) == 5  # the character is more than one token
    assert said(smile) == smile
    assert said(smile, max_gen_toks=3) == "a "
    assert said("one two. three", until=["two. t", "three"]) == "one "
    assert said("one two. three", until=["three", "", "two", "four"]) == "one "
    assert said("one two", until="one") == ""
    assert said("one<|im_start|> two", until=None) == "one two"


def test_the_space_in_front_of_an_answer_as_in_transformers(
    spm: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(spm[0])
    lm = YarnEdgeLM(str(spm[1]), ctx=64, threads=1)
    for text in ("The year", "  The year", "days 1901", "\n The"):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        answer = scripted(lm, [*tokens, lm.eot_token_id], {}, monkeypatch)
        assert answer == tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_sampling_follows_the_harness_seed(smol: YarnEdgeLM) -> None:
    def said(seed: int, **gen_kwargs: Any) -> str:
        random.seed(seed)
        return str(smol.generate_until([request("generate_until", "We", {"max_gen_toks": 8, **gen_kwargs})])[0])

    wild = {"do_sample": True, "temperature": 1.5}
    assert said(1, **wild) == said(1, **wild) != said(2, **wild)
    greedy = said(1)
    assert greedy == said(2, temperature=0.0, num_beams=1) == said(3, do_sample=False, temperature=0.7, top_p=0.9)
    assert greedy == said(4, **wild, top_k=1) == said(5, do_sample=True, top_p=1e-6)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"repetition_penalty": 1.2}, "repetition_penalty: not supported"),
        ({"num_beams": 4}, "num_beams: not supported"),
        ({"max_length": 9}, "max_length: not supported"),
        ({"until": [3]}, r"until is \[3\]"),
        ({"max_gen_toks": 0}, "max_gen_toks is 0"),
        ({"do_sample": True, "temperature": -1}, "temperature is -1.0"),
    ],
)
def test_generation_words_that_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(YarnEdgeError, match=message):
        parse_generation(given, 256)


def test_generation_words() -> None:
    words = {"until": "\n", "max_new_tokens": 7, "do_sample": True, "top_k": 3, "top_p": 0.5, "temperature": 0.5}
    made = parse_generation(words, 256)
    assert (made.max_tokens, made.stops) == (7, ("\n",))
    sampling = made.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 3, 0.5, 0)
    plain = parse_generation({}, 256)
    assert (plain.max_tokens, plain.stops, plain.sampling.temperature) == (256, (), 0)
    assert parse_generation({"do_sample": True}, 1).sampling.temperature == 1


def test_the_cache_may_have_two_types(smol_quants: dict[str, Path]) -> None:
    path = str(smol_quants["Q8_0"])
    for words in ({"kv_k": "q8_0", "kv_v": "q4_0"}, {"kv-k": "q8_0", "kv_type": "q4_0"}, {"kv_type": "q8_0/q4_0"}):
        assert parse_arguments({"path": path, **words}).variant.kv_type == "q8_0/q4_0"
    with pytest.raises(YarnEdgeError, match="'q9' is unknown; known: f32"):
        parse_arguments({"path": path, "kv_v": "q9"})


@pytest.mark.parametrize(
    "words, message",
    [
        ("ctx=64", "path=MODEL.gguf is missing"),
        ("path={},kv_typ=f16", "'kv_typ' is unknown; known: path, ctx"),
        ("path={},pretrained=x", "'pretrained' is unknown"),
        ("path={},ctx=1", "ctx is 1, must be from 2"),
        ("path={},ctx=4x", "ctx is '4x', not a whole number"),
        ("path={},threads=0", "threads is 0"),
        ("path={},kv_type=q3", "'q3' is unknown"),
        ("path={}@kv=q4_0,kv_type=f16", "kv appears twice"),
        ("path={},yarn_factor=much", "'much' is not a number"),
        ("path={},add_bos_token=perhaps", "add_bos_token is 'perhaps'"),
        ("path={},flash_attention=maybe", "flash_attention is 'maybe', must be auto, on or off"),
        ("path={},prefix_token_id=99999999", "there is no token 99999999"),
        ("path={}.gguf", "No such file"),
        ("path={},backend=cuda", "no cuda device"),
    ],
)
def test_model_arguments_that_are_refused(words: str, message: str, smol_quants: dict[str, Path]) -> None:
    with pytest.raises((YarnEdgeError, OSError), match=message):
        get_model("yarn_edge").create_from_arg_string(words.format(smol_quants["Q8_0"]), {"batch_size": 1})


def test_model_arguments_make_a_variant(smol_quants: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    path = smol_quants["Q8_0"]
    words = f"path={path}@kv=q8_0,yarn-factor=2,yarn_attention_factor=1.2,ctx=128,batch=32,flash_attention=on"
    lm = get_model("yarn_edge").create_from_arg_string(
        words, {"batch_size": 4, "max_batch_size": 8, "device": "cuda:0"}
    )
    assert "--batch_size and --device have no effect" in caplog.text
    assert lm.variant.label == f"{path}@kv=q8_0,yarn-factor=2,yarn-attention-factor=1.2"
    assert (lm.variant.kv_type, lm.max_length, lm.requests.context.n_batch) == ("q8_0", 128, 32)
    assert lm.requests.context.arguments.rope_freq_scale == 0.5
    assert lm.get_model_info()["model_flash_attention"] == "flash"
    lm.close()


def test_the_default_context_is_bounded(spm: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert YarnEdgeLM(str(spm[1])).max_length == 1024
    monkeypatch.setattr("yarn_edge.bench.lm_eval.model.DEFAULT_CTX", 512)
    assert YarnEdgeLM(str(spm[1])).max_length == 512


def test_nan_is_an_error(smol: YarnEdgeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    smol.requests.forget()
    monkeypatch.setattr(
        smol.requests.context,
        "logits_in_place",
        lambda: np.full((1, smol.requests.context.model.n_vocab), np.nan, np.float32),
    )
    with pytest.raises(YarnEdgeError, match="not numbers"):
        smol.loglikelihood([request("loglikelihood", "a", " b")])


@pytest.mark.parametrize("system", [True, False])
def test_chat_templates_as_in_transformers(system: bool, smol: YarnEdgeLM, smol_checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smol_checkpoint)
    messages = [{"role": "system", "content": "Be brief."}] if system else []
    messages += [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Who?"},
    ]
    assert smol.chat_template(True) == tokenizer.chat_template
    assert smol.chat_template(False) is None
    wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert smol.apply_chat_template(messages) == wanted
    assert smol.tok_encode(wanted) == tokenizer.encode(wanted)
    messages.append({"role": "assistant", "content": "The answer is "})
    wanted = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert smol.apply_chat_template(messages, add_generation_prompt=False) == wanted


def test_a_template_that_trims_the_answer_begun(smol: YarnEdgeLM, smol_checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    source = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }};{% endfor %}"
    messages = [{"role": "user", "content": " Who? "}, {"role": "assistant", "content": "It is "}]
    tokenizer = AutoTokenizer.from_pretrained(smol_checkpoint)
    wanted = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, continue_final_message=True)
    smol.apply_chat_template(messages)
    with ChatTemplate(source) as template, pytest.MonkeyPatch.context() as patch:
        patch.setattr(smol, "_template", template)
        assert (
            smol.apply_chat_template(messages, add_generation_prompt=False) == wanted == "[user]Who?;[assistant]It is"
        )


def test_a_template_without_a_system_role(smol: YarnEdgeLM, caplog: pytest.LogCaptureFixture) -> None:
    source = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m.content }};{% endfor %}"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    with ChatTemplate(source) as template, pytest.MonkeyPatch.context() as patch:
        patch.setattr(smol, "_template", template)
        assert smol.apply_chat_template(messages) == "Who?;"
        assert "the system message is left out" in caplog.text
    with ChatTemplate("{{ raise_exception('never') }}") as template, pytest.MonkeyPatch.context() as patch:
        patch.setattr(smol, "_template", template)
        with pytest.raises(YarnEdgeError, match="never"):
            smol.apply_chat_template(messages)


def test_without_a_chat_template(spm: tuple[Path, Path], smol: YarnEdgeLM) -> None:
    with pytest.raises(YarnEdgeError, match="leave out --apply_chat_template"):
        YarnEdgeLM(str(spm[1]), ctx=32).apply_chat_template([{"role": "user", "content": "Who?"}])
    with pytest.raises(YarnEdgeError, match="only the file's default"):
        smol.chat_template("tool_use")


def test_answers_from_the_harness_cache(smol: YarnEdgeLM, tmp_path: Path) -> None:
    asked = {
        "loglikelihood": [request("loglikelihood", "We", " say"), request("loglikelihood", "We", " are")],
        "loglikelihood_rolling": [request("loglikelihood_rolling", "We say")],
        "generate_until": [request("generate_until", "We", {"max_gen_toks": 2})],
    }
    first = {kind: getattr(smol, kind)(requests) for kind, requests in asked.items()}
    cached = CachingLM(smol, str(tmp_path / "answers.db"))
    for kind, requests in asked.items():
        getattr(smol, kind)(requests)  # what the model itself adds meanwhile
        before = smol.requests.n_given
        found = getattr(cached, kind)(requests)
        assert smol.requests.n_given == before
        assert (
            np.array(found) == pytest.approx(np.array(first[kind]), abs=NEAR)
            if kind != "generate_until"
            else found == first[kind]
        )
    cached.dbdict.close()
    smol.set_cache_hook(type(smol.cache_hook)(None))


def command_line(*words: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    start = ["-m", yarn_edge.bench.lm_eval.harness.__name__] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *start, *words],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **OFFLINE},
    )


def test_the_command_line(tasks: Path, smol_quants: dict[str, Path], tmp_path: Path) -> None:
    model = f"path={smol_quants['Q8_0']}@kv=q8_0,ctx=128,threads=1"
    words = ["--model", "yarn_edge", "--tasks", "facts", "--num_fewshot", "1", "--limit", "2"]
    output = str(tmp_path / "out.json")
    done = command_line(*words, "--model_args", model, "--include_path", str(tasks), "--output_path", output)
    assert done.returncode == 0, done.stderr
    assert "|facts|" in done.stdout.replace(" ", "")
    (written,) = tmp_path.glob("out_*.json")
    results = json.loads(written.read_text())
    assert results["n-shot"]["facts"] == 1
    assert results["config"]["model_kv_type"] == "q8_0"
    assert "No such" not in done.stderr


def test_errors_of_the_command_line(tasks: Path) -> None:
    words = ["--model", "yarn_edge", "--tasks", "facts", "--include_path", str(tasks), "--model_args"]
    done = command_line(*words, "path=nowhere.gguf")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "yarn-edge: error: nowhere.gguf: No such file or directory"
    assert "Traceback" not in done.stderr
    missing = "import sys; sys.modules['lm_eval'] = None\n"
    done = command_line(
        code=missing + "import runpy; runpy.run_module('yarn_edge.bench.lm_eval.harness', run_name='__main__')"
    )
    assert done.returncode == 2
    assert done.stderr == "yarn-edge: error: needs lm_eval: pip install 'yarn-edge[lm-eval]'\n"
    done = command_line(code=missing + "import yarn_edge.bench.lm_eval.harness")
    assert "ModuleNotFoundError: needs lm_eval: pip install 'yarn-edge[lm-eval]'" in done.stderr
