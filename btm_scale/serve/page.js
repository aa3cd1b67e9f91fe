"use strict";
const settings = JSON.parse(document.getElementById("settings").textContent);
const at = (id) => document.getElementById(id);
let asked = 0;
let running = null;
let timer = 0;

function headers() {
  const key = at("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

function say(message, wrong = false) {
  at("by").textContent = message;
  at("by").classList.toggle("wrong", wrong);
}

async function post(path, body, signal) {
  const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!response.ok) {
    const answer = await response.json().catch(() => ({}));
    throw new Error(answer.error ? answer.error.message : `The server answered ${response.status}.`);
  }
  return response;
}

function show(posterior, drawn) {
  const rows = Object.entries(posterior).sort((a, b) => b[1] - a[1]).map(([name, weight]) => {
    const row = document.createElement("div");
    row.className = name === drawn ? "weight drawn" : "weight";
    row.dataset.expert = name;
    const label = document.createElement("span");
    label.textContent = name;
    label.title = name;
    const bar = document.createElement("progress");
    bar.max = 1;
    bar.value = weight;
    const number = document.createElement("span");
    number.textContent = weight.toFixed(3);
    row.append(label, bar, number);
    return row;
  });
  at("weights").replaceChildren(...rows);
}

async function update() {
  const number = ++asked;
  try {
    const answer = await (await post("v1/posterior", { input: at("prompt").value })).json();
    if (number === asked && !running) show(answer.posterior);
  } catch (error) {
    if (number === asked) say(error.message, true);
  }
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function write(event) {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  at("send").disabled = true;
  at("stop").hidden = false;
  const prompt = at("prompt").value;
  at("said").textContent = prompt;
  at("text").textContent = "";
  say("");
  try {
    const body = {
      model: at("model").value, prompt, stream: true,
      temperature: Number(at("temperature").value), max_tokens: Number(at("tokens").value),
    };
    for await (const chunk of events(await post("v1/completions", body, running.signal))) {
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.btm) {
        show(chunk.btm.posterior, chunk.btm.expert);
        say(chunk.btm.expert ? `Written by ${chunk.btm.expert}` : "Written by the mixture of all experts");
      }
      for (const choice of chunk.choices) at("text").textContent += choice.text;
    }
  } catch (error) {
    if (error.name !== "AbortError") say(error.message, true);
  } finally {
    running = null;
    at("send").disabled = false;
    at("stop").hidden = true;
  }
}

at("prompt").addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(update, 200);
});
at("form").addEventListener("submit", write);
at("stop").addEventListener("click", () => running && running.abort());
update();
