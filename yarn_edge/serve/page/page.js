// The built-in page: conversations with the server that it came from, and with no other.
"use strict";

const at = (id) => document.getElementById(id);
// Each conversation: {pane, tab, title, said: messages as they are sent, documents: [{name, text, tokens}] for the next question,
// calls: [{id, box}] that wait for results, asked: the line that asks for them, used: tokens, running: AbortController, fields: what its text boxes hold}.
const talks = [];
const FIELDS = ["system", "tools", "question"];
let shown = null, context = 0;
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
  if (!reply.ok) {
    const answer = await reply.json().catch(() => ({}));
    const problem = answer.error?.message || `the server answered with status ${reply.status}`;
    if (reply.status !== 401) throw new Error(problem);
    await askKey(problem);
    return ask(path, body, signal);
  }
  return reply;
}

function askKey(problem) {
  at("key-problem").textContent = key ? problem : "";
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

function newTalk() {
  const talk = { pane: element("div"), tab: element("div", "tab"), title: "New", said: [], documents: [], calls: [], used: 0, running: null, fields: {} };
  talk.pane.append(element("p", "hint", "Drop a document here (text, Markdown, source code), or just ask."));
  const name = element("button", "", talk.title), away = element("button", "", "×");
  name.setAttribute("role", "tab");
  name.onclick = () => show(talk);
  away.setAttribute("aria-label", "close this conversation");
  away.onclick = () => closeTalk(talk);
  talk.tab.append(name, away);
  at("tabs").append(talk.tab);
  talks.push(talk);
  show(talk);
}

function closeTalk(talk) {
  talk.running?.abort();
  talks.splice(talks.indexOf(talk), 1);
  talk.tab.remove();
  if (!talks.length) newTalk();
  else if (shown === talk) show(talks[talks.length - 1]);
}

function show(talk) {
  if (shown) for (const name of FIELDS) shown.fields[name] = at(name).value;
  if (shown !== talk) for (const name of FIELDS) at(name).value = talk.fields[name] || "";
  shown = talk;
  at("talk").replaceChildren(talk.pane);
  refresh(talk);
  toEnd();
  at("question").focus();
}

function toEnd() {
  at("talk").scrollTop = at("talk").scrollHeight;
}

// Changes a conversation. If its end was in view, it still is; who has scrolled back to read is left there.
function grow(talk, change) {
  const { scrollHeight, scrollTop, clientHeight } = at("talk");
  change();
  if (talk === shown && scrollHeight - scrollTop - clientHeight < 40) toEnd();
}

// Everything around the pane that tells of a conversation.
function refresh(talk) {
  talk.tab.classList.toggle("busy", talk.running !== null);
  talk.tab.firstChild.textContent = talk.title;
  if (talk !== shown) return;
  talk.tab.scrollIntoView();
  for (const other of talks) {
    other.tab.classList.toggle("shown", other === talk);
    other.tab.firstChild.setAttribute("aria-selected", other === talk);
  }
  at("stop").hidden = !talk.running;
  at("send").hidden = !!talk.running;
  at("used").style.width = `${Math.min(100, (100 * talk.used) / context)}%`;
  at("meter").setAttribute("aria-valuenow", talk.used);
  at("tokens").textContent = `${talk.used} of ${context} tokens`;
  showDocuments();
}

function showDocuments() {
  const talk = shown;
  at("documents").replaceChildren(...talk.documents.map((one) => {
    const made = element("span", "document", `${one.name}, ${one.tokens} tokens`);
    const away = element("button", "", "×");
    away.type = "button";
    away.setAttribute("aria-label", `remove ${one.name}`);
    away.onclick = () => { talk.documents = talk.documents.filter((other) => other !== one); showDocuments(); };
    made.append(away);
    return made;
  }));
}

async function addFiles(files) {
  const talk = shown;
  for (const file of files) {
    try {
      const bytes = await file.arrayBuffer();
      const text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
      if (text.includes("\0")) throw new TypeError();
      const unread = (problem) => { throw new Error(`${file.name}: ${problem.message}`); };
      const { tokens } = await (await ask("tokenize", { text }).catch(unread)).json();
      if (tokens >= context) throw new Error(`${file.name} has ${tokens} tokens, but the context holds ${context}`);
      talk.documents.push({ name: file.name, text, tokens });
    } catch (problem) {
      complain(talk, problem instanceof TypeError ? `${file.name} is not UTF-8 text` : problem.message);
    }
  }
  showDocuments();
}

function add(talk, ...elements) {
  talk.pane.querySelector(".hint")?.remove();
  talk.pane.append(...elements);
  if (talk === shown) toEnd();
}

function complain(talk, message) {
  const made = element("p", "turn error", message);
  add(talk, made);
  return made;
}
const trimmed = (text) => text.replace(/^\n+|\n+$/g, "");

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

// How busy the server is; a question that waits for its turn says so.
async function showLoad() {
  try {
    const { running, parallel, waiting } = await (await fetch("health")).json();
    at("load").textContent = `${running} of ${parallel} running, ${waiting} waiting`;
    return waiting;
  } catch { at("load").textContent = "the server does not answer"; }
}

function request(talk) {
  const system = (talk === shown ? at("system").value : talk.fields.system || "").trim();
  const tools = (talk === shown ? at("tools").value : talk.fields.tools || "").trim();
  const body = { messages: talk.said, stream: true, stream_options: { include_usage: true } };
  if (system) body.messages = [{ role: "system", content: system }, ...talk.said];
  if (tools) {
    try { body.tools = JSON.parse(tools); } catch (problem) { throw new Error(`Tools: ${problem.message}`); }
  }
  return body;
}

// A call as it arrives: its name, its arguments, a box for the result.
function showCall(talk, turn, delta) {
  let call = turn.calls[delta.index];
  if (!call) {
    call = turn.calls[delta.index] = { id: delta.id, name: delta.function.name, arguments: "", box: element("div", "call") };
    call.box.append(element("strong", "name", call.name), element("pre", "arguments"));
    turn.box.insertBefore(call.box, turn.numbers);
  }
  call.arguments += delta.function.arguments || "";
  call.box.querySelector("pre").textContent = call.arguments;
}

function askResults(talk, calls) {
  talk.calls = calls;
  for (const call of calls) {
    const box = element("textarea", "result");
    box.rows = 2;
    box.placeholder = `What ${call.name} returns`;
    box.setAttribute("aria-label", `Result of ${call.name}`);
    call.result = box;
    call.box.append(box);
  }
  const button = element("button", "results", calls.length > 1 ? "Send results" : "Send result");
  button.type = "button";
  button.onclick = () => {
    if (talk.running) return;
    for (const call of calls) {
      talk.said.push({ role: "tool", tool_call_id: call.id, content: call.result.value });
      call.result.readOnly = true;
    }
    talk.calls = [];
    talk.asked?.remove();
    button.remove();
    answer(talk, () => {});
  };
  calls[calls.length - 1].box.append(button);
}

async function send(talk, question) {
  const { documents } = talk;
  const names = documents.map((one) => `[${one.name}] `).join("");
  const content = [...documents.map((one) => one.text), question].map(trimmed).join("\n\n");
  if (!talk.said.length) talk.title = (question || documents[0].name).slice(0, 24);
  talk.said.push({ role: "user", content });
  talk.documents = [];
  const bubble = element("div", "turn user", names + question);
  add(talk, bubble);
  await answer(talk, () => {
    talk.said.pop();
    bubble.remove();
    talk.documents = documents;
    // In front of what has been typed meanwhile.
    const whole = (typed) => [question, typed].filter(Boolean).join("\n");
    if (talk === shown) at("question").value = whole(at("question").value);
    else talk.fields.question = whole(talk.fields.question);
  });
}

// Asks for the next answer of a conversation. undo: if there is none.
async function answer(talk, undo) {
  const turn = { box: element("div", "turn"), calls: [], text: "", thoughts: "" };
  const thought = element("div", "reasoning"), text = element("div", "answer");
  turn.numbers = element("div", "numbers", "reading…");
  turn.box.append(thought, text, turn.numbers);
  add(talk, turn.box);
  talk.running = new AbortController();
  refresh(talk);
  const began = performance.now();
  let first = 0, pieces = 0, queue = 0;
  const showWaiting = () => {
    const seconds = Math.floor((performance.now() - began) / 1000);
    turn.numbers.textContent = first ? `${pieces} pieces…` : queue ? `waiting, ${queue} in the queue… ${seconds} s` : `reading… ${seconds} s`;
  };
  const clock = setInterval(async () => { showWaiting(); queue = (await showLoad()) || 0; }, 500);
  try {
    for await (const event of events(await ask("v1/chat/completions", request(talk), talk.running.signal))) {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices?.[0]?.delta || {};
      if (delta.content || delta.reasoning_content || delta.tool_calls) {
        first ||= performance.now();
        pieces += 1;
        showWaiting();
      }
      grow(talk, () => {
        if (delta.reasoning_content) thought.textContent = turn.thoughts += delta.reasoning_content;
        if (delta.content) { turn.text += delta.content; text.replaceChildren(rendered(turn.text)); }
        for (const call of delta.tool_calls || []) showCall(talk, turn, call);
      });
      if (event.usage) {
        const { total_tokens: used, completion_tokens: n, tok_per_s: speed } = event.usage;
        clearInterval(clock);
        talk.used = used;
        turn.numbers.textContent = `${n} tokens` + (speed ? `, ${speed.toFixed(1)} tok/s` : "") + (first ? `, first token after ${((first - began) / 1000).toFixed(2)} s` : "");
      }
    }
    keep(talk, turn);
    if (turn.calls.length) grow(talk, () => askResults(talk, turn.calls));
  } catch (problem) {
    const stopped = problem.name === "AbortError";
    turn.numbers.textContent = stopped ? "stopped" : "";
    if (!stopped) complain(talk, problem.message);
    turn.calls = []; // one that was cut off cannot be answered
    if (turn.text) keep(talk, turn);
    else undo();
    if (!stopped && !turn.text) turn.box.remove();
  }
  clearInterval(clock);
  talk.running = null;
  refresh(talk);
  showLoad();
  if (talk === shown) at("question").focus();
}

function keep(talk, turn) {
  const message = { role: "assistant", content: turn.text };
  if (turn.thoughts) message.reasoning_content = turn.thoughts;
  if (turn.calls.length) message.tool_calls = turn.calls.map(({ id, name, arguments: given }) => ({ id, type: "function", function: { name, arguments: given } }));
  talk.said.push(message);
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const talk = shown, question = at("question").value.trim();
  if ((!question && !talk.documents.length) || talk.running) return;
  if (talk.calls.length) {
    talk.asked?.remove();
    talk.asked = complain(talk, "Type the results of the calls first.");
    return;
  }
  at("question").value = "";
  send(talk, question);
});
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); at("ask").requestSubmit(); }
});
at("stop").addEventListener("click", () => shown.running?.abort());
at("reset").addEventListener("click", newTalk);
at("file").addEventListener("change", (event) => { addFiles([...event.target.files]); event.target.value = ""; /* this empties its list */ });
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    at("talk").classList.toggle("over", kind === "dragover");
    if (kind === "drop") addFiles(event.dataTransfer.files);
  });
}

newTalk();
(async () => {
  try {
    const { data } = await (await ask("v1/models")).json();
    context = data[0].context_length;
    at("model").textContent = document.title = data[0].id;
    refresh(shown);
    showLoad();
  } catch (problem) { complain(shown, problem.message); }
})();
