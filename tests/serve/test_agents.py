"""Real answers through clients that nobody here wrote: `llm`, the Vercel AI SDK, the schema of a real tool. Most only with --full."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from support import depth
from support.serving import KEY, Server

only_full = pytest.mark.skipif(not depth.full, reason="only with --full")
SUBJECTS = [
    "Rome",
    "Oslo",
    "Cairo",
    "Lima",
    "Quito",
    "Paris",
    "Bern",
    "Delhi",
    "Tokyo",
    "Seoul",
    "Dublin",
    "Prague",
    "Vienna",
    "Lisbon",
    "Madrid",
    "Athens",
    "Sofia",
    "Riga",
    "Tallinn",
    "Kyiv",
    "Ankara",
    "Baku",
    "Doha",
    "Muscat",
    "Hanoi",
]
PROMPTS = [f"{verb} {city}." for city in SUBJECTS for verb in ("Write a file about", "Change line 3 of the notes on")]
# The text editor of Anthropic's reference agents, as a function.
EDITOR: dict[str, Any] = {
    "type": "object",
    "properties": {
        "command": {"type": "string", "enum": ["view", "create", "str_replace", "insert"]},
        "path": {"type": "string", "maxLength": 40},
        "file_text": {"type": "string", "maxLength": 40},
        "insert_line": {"type": "integer", "minimum": 0, "maximum": 9999},
        "view_range": {
            "type": "array",
            "items": {"type": "integer", "minimum": 1, "maximum": 99},
            "minItems": 2,
            "maxItems": 2,
        },
        "options": {
            "type": "object",
            "properties": {"backup": {"type": "boolean"}},
            "required": ["backup"],
            "additionalProperties": False,
        },
    },
    "required": ["command", "path", "insert_line"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server("--api-key", KEY, "--name", "small")
    yield made
    assert made.end() == 0, made.notes
    assert "Traceback" not in made.notes


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key=KEY, base_url=f"http://127.0.0.1:{server.port}/v1", max_retries=0, timeout=300) as made:
        yield made


def valid(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is one of a schema, by a validator that is not ours."""
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


def each_answer(client: openai.OpenAI, prompts: Sequence[str], **more: Any) -> Iterator[Any]:
    """The answers to prompts, asked four at once, each with a seed of its own."""

    def asked(number: int) -> Any:
        message: Any = {"role": "user", "content": prompts[number]}
        made = client.chat.completions.create(model="small", messages=[message], seed=number, max_tokens=400, **more)
        return made.choices[0]

    with ThreadPoolExecutor(4) as threads:
        yield from threads.map(asked, range(len(prompts)))


@pytest.mark.timeout(1200)
def test_every_answer_has_the_schema(client: openai.OpenAI) -> None:
    """Whatever a small model writes; 50 prompts with --full."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "edit", "schema": EDITOR, "strict": True}}
    for choice in each_answer(client, PROMPTS if depth.full else PROMPTS[:1], response_format=form):
        assert choice.finish_reason == "stop", choice
        assert valid(json.loads(choice.message.content or ""), EDITOR), choice.message.content


@only_full
@pytest.mark.timeout(1200)
def test_a_call_is_forced(client: openai.OpenAI) -> None:
    """The model has never heard of tools; its arguments have the tool's schema all the same."""
    tools: Any = [{"type": "function", "function": {"name": "edit", "parameters": EDITOR}}]
    forced: dict[str, Any] = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    for choice in each_answer(client, PROMPTS[::2], **forced):
        (call,) = choice.message.tool_calls or []
        assert choice.finish_reason == "tool_calls"
        assert call.type == "function"
        assert valid(json.loads(call.function.arguments), EDITOR), call


def test_vectors(client: openai.OpenAI) -> None:
    """The package asks for base64 itself. What means the same is nearer than what does not."""
    texts = ["The cat sat on the mat.", "A cat was sitting on a rug.", "Interest rates rose by two percent."]
    plain = client.embeddings.create(model="small", input=texts, encoding_format="float")
    packed = client.embeddings.create(model="small", input=texts)
    assert [one.embedding for one in packed.data] == [one.embedding for one in plain.data]
    assert plain.usage.prompt_tokens == plain.usage.total_tokens > 15
    cat, rug, rates = (one.embedding for one in plain.data)

    def product(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert product(cat, cat) == pytest.approx(1, abs=1e-5)
    assert product(cat, rug) > product(cat, rates)
    for fields, message in (
        ({"input": ""}, "an empty text has no embedding"),
        ({"input": [[10**9]]}, "input: tokens are from 0 to"),
        ({"input": "a", "dimensions": 5}, "dimensions is not supported"),
        ({"input": ["a", 5]}, "input is "),
        ({"input": "word " * 2000}, "tokens, the context for embeddings holds 1024"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.embeddings.create(**{"model": "small", **fields})  # type: ignore[arg-type]


@only_full
def test_llm(server: Server, tmp_path: Path) -> None:
    """The command-line program `llm`, with our server among its models."""
    models = [
        {
            "model_id": "ours",
            "model_name": "small",
            "api_key_name": "ours",
            "api_base": f"http://127.0.0.1:{server.port}/v1",
            "supports_tools": True,
            "supports_schema": True,
        }
    ]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))
    (tmp_path / "keys.json").write_text(json.dumps({"ours": KEY}))
    program = Path(sys.executable).with_name("llm")
    command = [str(program)] if program.exists() else [sys.executable, "-m", "llm"]

    def llm(*words: str) -> str:
        env = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
        done = subprocess.run([*command, *words], capture_output=True, text=True, env=env, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert llm("-m", "ours", "-o", "max_tokens", "8", "Say hello").strip()
    assert llm("-m", "ours", "-o", "max_tokens", "8", "--no-stream", "Say hello").strip()
    made = json.loads(llm("-m", "ours", "--schema", "name, age int", "Invent a dog"))
    assert valid(made, {"type": "object", "required": ["name", "age"], "properties": {"age": {"type": "integer"}}})


AI_SDK = """
import { generateText, streamText, generateObject, tool, jsonSchema, stepCountIs } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
const ours = createOpenAICompatible({ name: "ours", baseURL: process.argv[2], apiKey: process.argv[3], supportsStructuredOutputs: true, includeUsage: true });
const model = ours("small"), seen = {};
const schema = jsonSchema({ type: "object", properties: { city: { type: "string", maxLength: 20 } }, required: ["city"], additionalProperties: false });
seen.text = (await generateText({ model, prompt: "Say hello.", maxOutputTokens: 8 })).text;
const streamed = streamText({ model, prompt: "Say hello.", maxOutputTokens: 8, temperature: 0 });
seen.stream = ""; for await (const part of streamed.textStream) seen.stream += part;
seen.usage = await streamed.usage;
seen.object = (await generateObject({ model, schema, prompt: "Name a city.", maxOutputTokens: 80 })).object;
const weather = tool({ description: "The weather", inputSchema: schema, execute: async ({ city }) => { seen.executed = city; return "Rain"; } });
const called = await generateText({ model, tools: { weather }, toolChoice: "required", prompt: "Weather in Rome?", maxOutputTokens: 80, stopWhen: stepCountIs(1) });
seen.calls = called.toolCalls.map((call) => [call.toolName, call.input]);
console.log(JSON.stringify(seen));
"""


@only_full
def test_the_vercel_ai_sdk(server: Server, tmp_path: Path) -> None:
    """With its provider for servers like OpenAI's; installed by npm into a folder of its own, and kept there."""
    if shutil.which("npm") is None:
        pytest.skip("no npm")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "yarn-edge" / "ai-sdk"
    if not (cache / "node_modules" / "ai").exists():
        cache.mkdir(parents=True, exist_ok=True)
        packages = ["ai@6.0.326", "@ai-sdk/openai-compatible@2.0.92"]
        install = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(cache), *packages]
        subprocess.run(install, check=True, timeout=300, capture_output=True)
    (cache / "drive.mjs").write_text(AI_SDK)
    command = ["node", str(cache / "drive.mjs"), f"http://127.0.0.1:{server.port}/v1", KEY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["text"]
    assert seen["stream"]
    assert seen["usage"]["outputTokens"] == 8
    assert isinstance(seen["object"]["city"], str)
    assert [name for name, _input in seen["calls"]] == ["weather"]
    assert seen["executed"] == seen["calls"][0][1]["city"]


@only_full
def test_schemathesis(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Requests made from /openapi.json: no 5xx, only statuses, types and errors that the document has."""
    from support.scripted_server import scripted_server

    program = Path(sys.executable).with_name("schemathesis")
    command = [str(program)] if program.exists() else [sys.executable, "-m", "schemathesis.cli"]
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    folder = tmp_path_factory.mktemp("schemathesis")
    with scripted_server(folder) as made:
        made.worker.says("Hello")
        words = [
            "run",
            f"{made.url}/openapi.json",
            "--checks",
            checks,
            "--max-examples",
            "60",
            "--seed",
            "1",
            "--exclude-path",
            "/v1/embeddings",
        ]
        done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=600, check=False, cwd=folder)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
