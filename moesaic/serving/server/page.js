"use strict";

// Talk to the model that this server has: stream its answers, and for a mixture of experts draw
// which experts each token used. One column a token, one row a layer, one colour an expert.

const CELL = 4; // pixels of an expert in a column
const ROW = 4; // pixels of a layer

const id = (name) => document.getElementById(name);
const state = { model: null, messages: [], abort: null };

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function headers() {
  const key = id("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function fault(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

async function begin() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) {
    id("facts").textContent = await fault(response);
    return;
  }
  state.model = (await response.json()).data[0];
  const { moe, chat } = state.model.moesaic;
  id("name").textContent = state.model.id;
  document.title = `${state.model.id} · Moesaic`;
  const about = moe
    ? `${moe.experts} experts, top-${moe.top_k}, in ${moe.layers} layers`
    : "dense";
  const form = chat ? "" : "; no chat template, so it goes on with your text";
  id("facts").textContent = `${about}; context ${state.model.max_model_len} tokens${form}`;
}

// A colour for each expert: hues as far from each other as the golden angle puts them.
const colour = (expert) => `hsl(${(expert * 137.508 + 20) % 360} 65% 52%)`;

class Answer {
  constructor(log) {
    this.box = element("article", "assistant");
    this.text = this.box.appendChild(element("div", "text"));
    this.strip = this.box.appendChild(element("div", "strip"));
    this.told = this.box.appendChild(element("div", "told"));
    this.legend = this.box.appendChild(element("div", "legend"));
    this.figures = this.box.appendChild(element("div", "figures"));
    log.appendChild(this.box);
    this.content = "";
    this.tokens = []; // {text, experts}
    this.spans = [];
    this.pieces = 0;
    this.asked = performance.now();
    this.first = null;
    this.last = null;
    this.usage = null;
    this.moe = state.model.moesaic.moe;
    this.strip.hidden = this.told.hidden = this.legend.hidden = !this.moe;
    if (this.moe) this.prepare();
  }

  prepare() {
    this.column = this.moe.top_k * CELL + 1;
    this.canvas = this.strip.appendChild(element("canvas"));
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", "Experts that each token used, layer by layer");
    this.canvas.width = this.canvas.height = 0;
    this.counts = new Array(this.moe.experts).fill(0);
    this.canvas.addEventListener("mousemove", (event) => {
      const token = Math.floor(event.offsetX / this.column);
      this.tell(token, Math.floor(event.offsetY / ROW));
    });
    this.canvas.addEventListener("mouseleave", () => this.tell(-1, 0));
  }

  tell(token, layer) {
    for (const span of this.spans) span.classList.remove("lit");
    const found = this.tokens[token];
    if (!found || !found.experts[layer]) {
      this.told.textContent = "";
      return;
    }
    this.spans[token].classList.add("lit");
    const experts = found.experts[layer].join(" and ");
    this.told.textContent =
      `token ${token + 1} ${JSON.stringify(found.text)}, MoE layer ${layer}: experts ${experts}`;
  }

  add(piece) {
    const now = performance.now();
    const text = piece.text ?? piece.delta?.content ?? "";
    const experts = piece.experts ?? [];
    if (!text && !experts.length) return;
    this.first ??= now;
    this.last = now;
    this.pieces += experts.length || 1;
    this.content += text;
    if (this.moe && experts.length) this.draw(experts);
    if (!this.moe) this.text.textContent = this.content;
    this.show();
  }

  draw(experts) {
    for (const token of experts) {
      const span = this.text.appendChild(element("span", "", token.text));
      const number = this.tokens.length;
      span.addEventListener("mouseenter", () => this.point(number));
      this.tokens.push(token);
      this.spans.push(span);
      for (const layer of token.experts) for (const expert of layer) this.counts[expert] += 1;
    }
    this.redraw(this.tokens.length - experts.length);
  }

  point(number) {
    this.tell(number, 0);
    const found = this.tokens[number];
    const layers = found.experts.map((layer) => layer.join("+")).join(" ");
    this.told.textContent = `token ${number + 1} ${JSON.stringify(found.text)}: ${layers}`;
  }

  redraw(from) {
    const wanted = this.tokens.length * this.column;
    if (wanted > this.canvas.width) {
      // A canvas that changes its size is empty: grow it now and then, not token by token.
      this.canvas.width = Math.max(wanted, Math.min(2 * wanted, 32000));
      this.canvas.height = this.moe.layers * ROW;
      from = 0;
    }
    this.canvas.parentElement.style.maxWidth = "100%";
    this.canvas.style.clipPath = `inset(0 ${this.canvas.width - wanted}px 0 0)`;
    const paint = this.canvas.getContext("2d");
    for (let token = from; token < this.tokens.length; token += 1) {
      this.tokens[token].experts.forEach((layer, row) => {
        layer.forEach((expert, place) => {
          paint.fillStyle = colour(expert);
          paint.fillRect(token * this.column + place * CELL, row * ROW, CELL, ROW - 1);
        });
      });
    }
    const all = this.counts.reduce((sum, count) => sum + count, 0);
    this.legend.replaceChildren(
      ...this.counts.map((count, expert) => {
        const entry = element("span");
        entry.appendChild(element("i")).style.background = colour(expert);
        entry.append(`expert ${expert}: ${((100 * count) / all).toFixed(1)}%`);
        return entry;
      }),
    );
  }

  show(ending) {
    const tokens = this.usage?.completion_tokens ?? this.pieces;
    const seconds = (this.last - this.first) / 1000;
    const parts = [];
    if (this.first !== null) {
      parts.push(`first token ${((this.first - this.asked) / 1000).toFixed(2)} s`);
    }
    if (tokens > 1 && seconds > 0) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
    parts.push(`${tokens} tokens`);
    if (this.usage) parts.push(`prompt ${this.usage.prompt_tokens}`);
    if (ending) parts.push(ending);
    this.figures.textContent = parts.join(" · ");
    this.box.dataset.done = ending ? "true" : "false";
  }

  fail(message) {
    this.box.appendChild(element("div", "wrong", message));
    this.box.dataset.done = "true";
  }

  finish(ending) {
    // Tokens that are half a character show as such in their column; the text is whole.
    if (this.spans.map((span) => span.textContent).join("") !== this.content) {
      if (this.content || !this.spans.length) this.text.textContent = this.content;
      this.spans = this.tokens.map(() => element("span"));
    }
    this.show(ending);
  }
}

function body() {
  const { id: model, moesaic } = state.model;
  const seed = id("seed").value;
  const system = id("system").value;
  const shared = {
    model,
    stream: true,
    stream_options: { include_usage: true },
    temperature: Number(id("temperature").value),
    max_tokens: Number(id("tokens").value),
    ...(seed && { seed: Number(seed) }),
    ...(moesaic.moe && { experts: true }),
  };
  if (!moesaic.chat) {
    return ["v1/completions", { ...shared, prompt: state.messages.at(-1).content }];
  }
  const first = system ? [{ role: "system", content: system }] : [];
  return ["v1/chat/completions", { ...shared, messages: [...first, ...state.messages] }];
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      if (part === "data: [DONE]") return;
      yield JSON.parse(part.slice(6));
    }
  }
  throw new Error("The server broke off before the end of its answer.");
}

async function ask(text) {
  const log = id("log");
  log.appendChild(element("article", "user")).appendChild(element("div", "text", text));
  state.messages.push({ role: "user", content: text });
  const answer = new Answer(log);
  state.abort = new AbortController();
  id("send").textContent = "Stop";
  let ending = "";
  try {
    const [path, asked] = body();
    const response = await fetch(path, {
      method: "POST",
      headers: headers(),
      body: JSON.stringify(asked),
      signal: state.abort.signal,
    });
    if (!response.ok) throw new Error(await fault(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) answer.usage = event.usage;
      for (const choice of event.choices) {
        const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
        answer.add(choice);
        if (choice.finish_reason) ending = choice.finish_reason;
        if (atEnd) log.scrollTop = log.scrollHeight;
      }
    }
    answer.finish(ending);
  } catch (error) {
    answer.finish(error.name === "AbortError" ? "stopped" : "failed");
    if (error.name !== "AbortError") answer.fail(error.message);
  }
  if (answer.content) state.messages.push({ role: "assistant", content: answer.content });
  else state.messages.pop();
  state.abort = null;
  id("send").textContent = "Send";
}

id("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (state.abort) {
    state.abort.abort();
    return;
  }
  if (!state.model) await begin();
  const text = id("prompt").value.trim();
  if (!text || !state.model) return;
  id("prompt").value = "";
  await ask(text);
});

id("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!state.abort) id("form").requestSubmit();
  }
});

id("clear").addEventListener("click", () => {
  state.abort?.abort();
  state.messages = [];
  id("log").replaceChildren();
});

begin().catch(() => {
  id("facts").textContent = "The server does not answer.";
});
