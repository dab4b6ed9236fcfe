"use strict";
// One column is one conversation: its speaker's own answers are what it goes on from.
const byId = (name) => document.getElementById(name);
const panel = byId("panel"), ask = byId("ask"), question = ask.elements.question;
const fields = ["temperature", "top_p", "seed", "max_new_tokens"];
const columns = [];
let stopper = null;

byId("model").textContent = about.model;
byId("note").textContent = about.note;
byId("note").hidden = !about.note;
document.title = `${about.model} \u2013 pica chat`;
for (const name of ["system", ...fields]) panel.elements[name].value = about[name];

function addColumn(speaker) {
  const part = byId("column").content.cloneNode(true);
  const [choice, said] = [part.querySelector("select"), part.querySelector(".said")];
  for (const name of about.speakers) choice.add(new Option(name === "base" ? "the model alone" : name, name));
  choice.value = speaker;
  const column = { choice, said, messages: [] };
  choice.addEventListener("change", () => begin([column]));
  byId("columns").append(part);
  columns.push(column);
}

function show(column, role, text) {
  const line = document.createElement("p");
  line.className = role;
  line.textContent = text;
  column.said.append(line);
  column.said.scrollTop = column.said.scrollHeight;
  return line;
}

function begin(which) {
  if (stopper) stopper.abort();
  for (const column of which) {
    column.messages = [];
    column.said.replaceChildren();
    const system = panel.elements.system.value.trim();
    if (system) {
      column.messages.push({ role: "system", content: system });
      show(column, "system", system);
    }
  }
  refresh();
}

function refresh() {
  const busy = stopper !== null;
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  for (const column of columns) column.choice.disabled = busy;
  byId("save").disabled = busy || !columns.some((column) => column.messages.some((one) => one.role === "assistant"));
  document.body.dataset.busy = busy;
}

async function answer(column, text, signal) {
  const before = [...column.messages], asked = [...before, { role: "user", content: text }];
  column.messages = asked;
  show(column, "user", text);
  const line = show(column, "assistant waiting", "");
  const settings = Object.fromEntries(fields.map((name) => [name, Number(panel.elements[name].value)]));
  let said = "", failed = "";
  try {
    const response = await fetch("/answer", {
      method: "POST", signal, headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ messages: asked, speaker: column.choice.value, ...settings }),
    });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "", ended = false;
    for (;;) {
      const { value, done } = await reader.read();
      const lines = (rest + (value ?? "")).split("\n");
      rest = done ? "" : lines.pop();
      for (const each of lines.filter(Boolean)) {
        const told = JSON.parse(each);
        if (told.error) failed = told.error;
        ended ||= Boolean(told.done || told.error);
        if (told.piece) {
          said += told.piece;
          line.textContent = said.trimStart();
          line.className = "assistant writing";
          column.said.scrollTop = column.said.scrollHeight;
        }
      }
      if (done) break;
    }
    if (!ended) failed = "The answer broke off; look at what pica chat says in its terminal.";
  } catch (error) {
    if (error.name !== "AbortError") failed = "pica chat cannot be reached; is it still running?";
  }
  if (column.messages !== asked) return; // begun anew meanwhile
  line.className = "assistant";
  line.textContent = said.trim();
  if (said.trim()) column.messages = [...asked, { role: "assistant", content: said.trim() }];
  else { column.messages = before; line.remove(); }
  if (failed) show(column, "error", failed);
}

ask.addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (!text || stopper || !panel.reportValidity()) return;
  question.value = "";
  const mine = stopper = new AbortController();
  refresh();
  await Promise.all(columns.map((column) => answer(column, text, mine.signal)));
  stopper = null;
  refresh();
  question.focus();
});
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask.requestSubmit(); }
});
byId("stop").addEventListener("click", () => stopper?.abort());
byId("again").addEventListener("click", () => begin(columns));
panel.elements.system.addEventListener("change", () => begin(columns));
panel.addEventListener("submit", (event) => event.preventDefault());
byId("settings").addEventListener("click", () => {
  panel.hidden = !panel.hidden;
  byId("settings").setAttribute("aria-expanded", String(!panel.hidden));
});
// As /save does in a terminal: a line for each column that pica train reads.
byId("save").addEventListener("click", () => {
  const spoken = columns.filter((column) => column.messages.some((one) => one.role === "assistant"));
  const lines = spoken.map((column) => JSON.stringify({ messages: column.messages, speaker: column.choice.value }) + "\n");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(lines, { type: "application/x-ndjson" }));
  link.download = "conversation.jsonl";
  link.click();
  URL.revokeObjectURL(link.href);
});

addColumn("base");
if (about.speakers.length > 1) addColumn(about.speakers[1]);
else question.placeholder = question.placeholder.replace("Ask both.", "Ask.");
begin(columns);
question.focus();
