// The built-in page: a conversation with the server that it came from, and with no other.
"use strict";

const at = (id) => document.getElementById(id);
const turns = []; // {question, documents: [{name, text, tokens}], answer}
let waiting = [], context = 0, running = null;
let key = sessionStorage.getItem("key") || "";

const element = (tag, name, text) => {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
};

async function ask(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const reply = await fetch(path, body === undefined ? { headers, signal } : { method: "POST", headers, body: JSON.stringify(body), signal });
  if (reply.status === 401) { await askKey(); return ask(path, body, signal); }
  if (!reply.ok) {
    const answer = await reply.json().catch(() => ({}));
    throw new Error(answer.error?.message || `the server answered with status ${reply.status}`);
  }
  return reply;
}

function askKey() {
  return new Promise((done) => {
    at("key").addEventListener("close", () => {
      key = at("key-value").value;
      sessionStorage.setItem("key", key);
      done();
    }, { once: true });
    at("key").showModal();
  });
}

// Text -> elements: paragraphs, headings, fenced code, bold and code inside a line. Nothing is ever parsed as HTML.
function rendered(text) {
  const parts = document.createDocumentFragment();
  text.split(/^```.*$/m).forEach((block, number) => {
    if (number % 2) {
      const pre = element("pre");
      pre.append(element("code", "", block.replace(/^\n|\n$/g, "")));
      parts.append(pre);
      return;
    }
    for (const paragraph of block.split(/\n{2,}/)) {
      if (!paragraph.trim()) continue;
      const heading = paragraph.match(/^#{1,6} (.*)$/);
      parts.append(inline(element(heading ? "h3" : "p"), heading ? heading[1] : paragraph.trim()));
    }
  });
  return parts;
}

function inline(into, text) {
  for (const piece of text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/)) {
    if (piece.startsWith("`") && piece.length > 2) into.append(element("code", "", piece.slice(1, -1)));
    else if (piece.startsWith("**") && piece.length > 4) into.append(element("strong", "", piece.slice(2, -2)));
    else into.append(piece);
  }
  return into;
}

function showUsed(tokens) {
  at("used").style.width = `${Math.min(100, (100 * tokens) / context)}%`;
  at("meter").setAttribute("aria-valuenow", tokens);
  at("tokens").textContent = `${tokens} of ${context} tokens`;
}

function showDocuments() {
  at("documents").replaceChildren(...waiting.map((one) => {
    const shown = element("span", "document", `${one.name}, ${one.tokens} tokens`);
    const away = element("button", "", "×");
    away.type = "button";
    away.setAttribute("aria-label", `remove ${one.name}`);
    away.onclick = () => { waiting = waiting.filter((other) => other !== one); showDocuments(); };
    shown.append(away);
    return shown;
  }));
}

async function addFiles(files) {
  for (const file of files) {
    try {
      const bytes = await file.arrayBuffer();
      const text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
      if (text.includes("\0")) throw new TypeError();
      const unread = (problem) => { throw new Error(`${file.name}: ${problem.message}`); };
      const { tokens } = await (await ask("tokenize", { text }).catch(unread)).json();
      if (tokens >= context) throw new Error(`${file.name} has ${tokens} tokens, but the context holds ${context}`);
      waiting.push({ name: file.name, text, tokens });
    } catch (problem) {
      complain(problem instanceof TypeError ? `${file.name} is not UTF-8 text` : problem.message);
    }
  }
  showDocuments();
}

function complain(message) {
  at("hint")?.remove();
  at("talk").append(element("p", "turn error", message));
  at("talk").scrollTop = at("talk").scrollHeight;
}

const said = (turn) => [...turn.documents.map((one) => one.text), turn.question].map((text) => text.replace(/^\n+|\n+$/g, "")).join("\n\n");

function messages() {
  const system = at("system").value.trim();
  const list = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns) {
    list.push({ role: "user", content: said(turn) });
    if (turn.answer !== null) list.push({ role: "assistant", content: turn.answer });
  }
  return list;
}

async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const lines = held.split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      yield JSON.parse(line.slice(6));
    }
  }
}

async function send(question) {
  const turn = { question, documents: waiting, answer: null };
  turns.push(turn);
  waiting = [];
  showDocuments();
  at("hint")?.remove();
  const names = turn.documents.map((one) => `[${one.name}] `).join("");
  at("talk").append(element("div", "turn user", names + question));
  const box = element("div", "turn"), thought = element("div", "reasoning"), answer = element("div", "answer");
  const numbers = element("div", "numbers", "reading…");
  box.append(thought, answer, numbers);
  at("talk").append(box);
  running = new AbortController();
  at("stop").hidden = false;
  at("send").hidden = true;
  const began = performance.now();
  let first = 0, pieces = 0;
  const showWaiting = () => {
    const seconds = Math.floor((performance.now() - began) / 1000);
    numbers.textContent = first ? `${pieces} pieces…` : `reading… ${seconds} s`;
  };
  const clock = setInterval(showWaiting, 500);
  turn.answer = "";
  try {
    const body = { messages: messages().slice(0, -1), stream: true, stream_options: { include_usage: true } };
    for await (const event of events(await ask("v1/chat/completions", body, running.signal))) {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices?.[0]?.delta || {};
      if (delta.content || delta.reasoning_content) {
        first ||= performance.now();
        pieces += 1;
        showWaiting();
      }
      if (delta.reasoning_content) thought.textContent += delta.reasoning_content;
      if (delta.content) { turn.answer += delta.content; answer.replaceChildren(rendered(turn.answer)); }
      if (event.usage) {
        clearInterval(clock);
        const { total_tokens: used, completion_tokens: n, tok_per_s: speed } = event.usage;
        showUsed(used);
        numbers.textContent = `${n} tokens` + (speed ? `, ${speed.toFixed(1)} tok/s` : "") + (first ? `, first token after ${((first - began) / 1000).toFixed(2)} s` : "");
      }
      at("talk").scrollTop = at("talk").scrollHeight;
    }
  } catch (problem) {
    numbers.textContent = problem.name === "AbortError" ? "stopped" : "";
    if (problem.name !== "AbortError") complain(problem.message);
    if (!turn.answer) { turns.pop(); waiting = turn.documents; showDocuments(); at("question").value = question; }
  }
  clearInterval(clock);
  running = null;
  at("stop").hidden = true;
  at("send").hidden = false;
  at("question").focus();
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = at("question").value.trim();
  if ((!question && !waiting.length) || running) return;
  at("question").value = "";
  send(question);
});
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); at("ask").requestSubmit(); }
});
at("stop").addEventListener("click", () => running?.abort());
at("reset").addEventListener("click", () => {
  running?.abort();
  turns.length = 0;
  waiting = [];
  showDocuments();
  showUsed(0);
  at("talk").replaceChildren();
});
at("file").addEventListener("change", (event) => { addFiles(event.target.files); event.target.value = ""; });
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    at("talk").classList.toggle("over", kind === "dragover");
    if (kind === "drop") addFiles(event.dataTransfer.files);
  });
}

(async () => {
  try {
    const { data } = await (await ask("v1/models")).json();
    context = data[0].context_length;
    at("model").textContent = document.title = data[0].id;
    showUsed(0);
  } catch (problem) { complain(problem.message); }
})();
