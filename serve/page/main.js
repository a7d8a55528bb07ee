// The page: what is asked of the server, what is shown, and what the user does.

const $ = (id) => document.getElementById(id);
const PAUSE = 150; // milliseconds without a key before a prompt is sent
const RIVALS = 6; // candidates for each token of a stream

const state = {
  run: null, // GET /playground/run
  tokens: [], // of the text: { id, text, named, logprob, rivals: [{ id, text, named, logprob }], generated }
  shown: 0, // the maps are those of the tokens from this one on
  next: null, // after the text: all logits in descending order, and the likeliest tokens
  messages: [], // of the chat
  chat: false,
  generating: null, // AbortController
  inspecting: null, // AbortController
};
const view = new TextView($("text"), refresh);
const maps = new Maps($("heads"), $("map"), refresh);

// 1. What is asked of the server -------------------------------------------------------------------------------------

// Show how a text looks to the model. body: of POST /playground/inspect. before: tokens of the text that are not in
// the body. known: the tokens of the body, if they were shown already.
async function inspect(body, before = [], known = []) {
  state.inspecting?.abort();
  state.inspecting = new AbortController();
  const found = await requestJson("/playground/inspect", body, state.inspecting.signal).catch((error) => {
    document.body.classList.toggle("stale", error.name !== "AbortError"); // what is shown is another text
    throw error;
  });
  document.body.classList.remove("stale");
  const named = new Set(found.named);
  const token = (id, logprob) => ({ id, text: found.texts[id], named: named.has(id), logprob });
  const rivals = found.rivals.map((row) => row.map(([id, logprob]) => token(id, logprob)));
  const tokens = found.tokens.map((id, at) => ({
    ...token(id, at ? found.logprobs[at] : known[0]?.logprob),
    rivals: at ? rivals[at - 1] : known[0]?.rivals ?? [],
    generated: Boolean(known[at]?.generated),
  }));
  state.tokens = [...before, ...tokens];
  state.shown = before.length;
  state.next = { ...sortedLogits(new Float32Array(bytes(found.logits).buffer)), likeliest: rivals.at(-1) };
  view.show(state.tokens, state.shown);
  maps.set(found.maps, tokens, state.run.mixers);
  maps.drawAll();
  showNext();
}

// Show how the tokens look to the model, the last of them if there are too many.
async function inspectTokens(tokens, selected = -1) {
  const skipped = Math.max(0, tokens.length - state.run.most_inspected);
  const rest = tokens.slice(skipped);
  await inspect({ tokens: rest.map(({ id }) => id) }, tokens.slice(0, skipped), rest);
  view.select(selected);
}

// Let the model continue the text. Returns the text that it adds.
async function generate(signal) {
  const { run } = state;
  const { temperature, topK, topP } = settings();
  const prompt = state.tokens.slice(-run.context).map(({ id }) => id);
  const body = {
    model: run.name, prompt, max_tokens: Number($("length").value), temperature, top_k: topK, top_p: topP,
    logprobs: RIVALS, return_token_ids: true,
  };
  let text = "";
  let count = 0;
  for await (const { choices: [choice] } of events("/v1/completions", body, signal)) {
    const { tokens, token_logprobs, top_logprobs } = choice.logprobs;
    choice.token_ids.forEach((id, at) => {
      const rivals = Object.entries(top_logprobs[at]).map(([rival, logprob]) => ({ text: rival, logprob }));
      rivals.sort((a, b) => b.logprob - a.logprob);
      const token = { id, text: tokens[at], logprob: token_logprobs[at], rivals, generated: true };
      state.tokens.push(token);
      view.add(token);
    });
    text += choice.text;
    count += choice.token_ids.length;
    say(`${count} tokens …`);
    view.follow();
    refresh();
  }
  say(`${count} tokens`);
  return text;
}

// Do something that asks the server. What goes wrong is said to the user.
async function attempt(work) {
  try {
    await work();
    return true;
  } catch (error) {
    if (error.name === "AbortError") return false;
    if (!(error instanceof Problem)) console.error(error);
    showProblem(error);
    return false;
  }
}

// Prepare a prompt, let the model continue it, and show how the whole looks to it, however it ends.
async function run(prepare = async () => {}) {
  if (state.generating) return "";
  state.generating = new AbortController();
  const { signal } = state.generating;
  let text = "";
  busy(true);
  const prepared = await attempt(prepare);
  const size = state.tokens.length;
  const ended = prepared && !signal.aborted && (await attempt(async () => (text = await generate(signal))));
  if (!ended) say(signal.aborted ? `stopped after ${state.tokens.length - size} tokens` : "");
  if (state.tokens.length > size && (ended || signal.aborted)) {
    await attempt(() => inspectTokens(state.tokens, view.selected));
  }
  state.generating = null;
  busy(false);
  return text;
}

async function send() {
  const content = $("prompt").value.trim();
  if (!state.chat) return run(() => inspect({ text: $("prompt").value }));
  if (!content || state.generating) return;
  const messages = [...state.messages, { role: "user", content }];
  const answer = await run(async () => {
    await inspect({ messages, max_tokens: Number($("length").value) });
    $("prompt").value = "";
  });
  if (answer.trim()) state.messages = [...messages, { role: "assistant", content: answer }];
  else if (!$("prompt").value) $("prompt").value = content; // to be sent again
}

function stop() {
  state.generating?.abort();
}

// Put another token in the place of one, and leave out the rest.
function branch(index, { id }) {
  if (state.generating || state.chat) return;
  const token = { id, generated: true };
  attempt(() => inspectTokens([...state.tokens.slice(0, index), token], index));
}

async function start() {
  const started = await attempt(async () => {
    state.run = await requestJson("/playground/run");
    const { name, parameters, mixers, heads, context, can_chat, max_tokens } = state.run;
    const size = parameters < 1e6 ? `${(parameters / 1e3).toFixed(0)}k` : `${(parameters / 1e6).toPrecision(3)}M`;
    document.title = `${name} · heed playground`;
    $("name").textContent = name;
    $("facts").textContent = `${size} parameters · ${mixers.length} layers of ${heads} heads · context ${context}`;
    $("length").max = max_tokens;
    $("tabs").hidden = !can_chat;
    hideProblem();
  });
  if (!started) return;
  await attempt(() => (state.tokens.length ? inspectTokens(state.tokens, view.selected) : inspect({ text: $("prompt").value })));
}

// 2. What is shown ---------------------------------------------------------------------------------------------------

function settings() {
  const value = (id) => Number($(id).value);
  return { temperature: value("temperature"), topK: value("top-k"), topP: value("top-p") };
}

function say(text) {
  $("status").textContent = text;
}

function busy(is) {
  $("stop").hidden = !is;
  $("generate").disabled = $("continue").disabled = $("prompt").readOnly = is;
  $("read").classList.toggle("busy", is);
}

function showProblem({ message, gone }) {
  $("problem").firstElementChild.textContent = message;
  $("problem").hidden = false;
  $("retry").hidden = !gone;
}

function hideProblem() {
  $("problem").hidden = true;
}

// Show what is pointed at or selected: on the text, in the list of rivals, and on the map.
function refresh() {
  const pointed = maps.pointed && maps.pointed.query + state.shown;
  const current = pointed ?? view.current;
  const token = state.tokens[current];
  const query = current - state.shown;
  const weights = maps.weights(query);
  const attends = weights.length > 0;
  $("read").classList.toggle("by-attention", attends);
  $("by").textContent = maps.name;
  if (attends) {
    const most = Math.max(...weights);
    view.shade([...Array(state.shown).fill(0), ...weights.map((weight) => weight / most)]);
  } else {
    const bits = ({ logprob }) => -(logprob ?? 0) / Math.log(2);
    view.shade(state.tokens.map((each) => Math.min(1, bits(each) / 10)));
  }
  showToken(token, current);
  showAttended(weights);
  Object.assign(maps, { query: attends ? query : -1, key: maps.pointed?.key ?? -1 });
  maps.draw();
  const about = maps.pointed
    ? `${quoted(maps.tokens[maps.pointed.query])} attends to ${quoted(maps.tokens[maps.pointed.key])}: ` +
      percent(maps.weights(maps.pointed.query)[maps.pointed.key])
    : "Each row is a token, each column one that it may attend to.";
  $("map-caption").textContent = `${maps.name[0].toUpperCase()}${maps.name.slice(1)}. ${about}`;
  $("map").setAttribute("aria-label", `Attention map of ${maps.name}`);
}

function showToken(token, index) {
  const [title, hint] = $("token").children;
  const list = $("token").querySelector(".bars");
  hint.hidden = Boolean(token);
  $("token").classList.toggle("empty", !token);
  title.textContent = token ? "" : "No token selected";
  if (!token) return list.replaceChildren();
  const name = title.appendChild(document.createElement("span"));
  spell(name, token);
  title.append(token.logprob == null ? " begins the text" : ` ${percent(Math.exp(token.logprob))}`);
  const rivals = token.rivals.map((rival) => ({ token: rival, p: Math.exp(rival.logprob), chosen: same(rival, token) }));
  if (token.logprob != null && !rivals.some(({ chosen }) => chosen)) {
    rivals.push({ token, p: Math.exp(token.logprob), chosen: true });
  }
  const known = token.rivals.every(({ id }) => id !== undefined) && !state.chat;
  showBars(list, rivals, known && ((row) => branch(index, row.token)));
}

function same(rival, token) {
  return rival.id === undefined ? rival.text === token.text : rival.id === token.id;
}

function showAttended(weights) {
  const box = $("token").querySelector(".attended");
  box.hidden = !weights.length;
  box.firstElementChild.textContent = `Attends to, ${maps.name}`;
  const order = weights.map((_, key) => key).sort((a, b) => weights[b] - weights[a]).slice(0, 4);
  const rows = order.map((key) => ({ token: maps.tokens[key], p: weights[key], key }));
  showBars(box.lastElementChild, rows, ({ key }) => view.select(key + state.shown));
}

// Show the next-token distribution as the sliders reshape it. The marks are those of the model as it is.
function showNext() {
  const { temperature, topK, topP } = settings();
  const outputs = $("next").querySelectorAll("output");
  [temperature.toFixed(2), topK || "off", topP < 1 ? topP.toFixed(2) : "off"].forEach((text, at) => {
    outputs[at].textContent = text;
  });
  if (!state.next) return;
  const { logits, likeliest } = state.next;
  const before = distribution(logits, { temperature: 1, topK: 0, topP: 1 });
  const after = distribution(logits, { temperature, topK, topP });
  const rows = likeliest.map((token, at) => ({ token, p: after[at] ?? 0, before: before[at] }));
  const bits = after.reduce((sum, p) => (p > 0 ? sum - p * Math.log2(p) : sum), 0);
  const left = after.length < logits.length ? `${after.length.toLocaleString("en")} of ` : "";
  $("kept").textContent = `${left}${logits.length.toLocaleString("en")} tokens, entropy ${bits.toFixed(1)} bits`;
  showBars($("next").querySelector(".bars"), rows, !state.chat && (({ token }) => branch(state.tokens.length, token)));
}

// 3. What the user does ----------------------------------------------------------------------------------------------

let pause;
$("prompt").addEventListener("input", () => {
  clearTimeout(pause);
  if (state.chat || state.generating || !state.run) return;
  say("");
  pause = setTimeout(async () => (await attempt(() => inspect({ text: $("prompt").value }))) && hideProblem(), PAUSE);
});
$("prompt").addEventListener("keydown", (event) => {
  const sends = event.key === "Enter" && !event.isComposing && (state.chat ? !event.shiftKey : event.ctrlKey || event.metaKey);
  if (!sends) return;
  event.preventDefault();
  $("generate").click();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (state.generating) stop();
  else view.select(-1);
});
$("generate").onclick = () => {
  clearTimeout(pause);
  hideProblem();
  send();
};
$("continue").onclick = () => {
  hideProblem();
  run();
};
$("stop").onclick = stop;
$("map").onclick = () => maps.pointed && view.select(maps.pointed.query + state.shown);
$("clear").onclick = () => {
  stop();
  state.messages = [];
  attempt(() => inspect({ text: "" }));
};
$("retry").onclick = start;
$("dismiss").onclick = hideProblem;
$("next").addEventListener("input", showNext);

function choose(chat) {
  state.chat = chat;
  for (const [tab, is] of [[$("tab-text"), !chat], [$("tab-chat"), chat]]) {
    tab.setAttribute("aria-selected", String(is));
    tab.tabIndex = is ? 0 : -1;
  }
  stop();
  state.messages = [];
  $("prompt-label").textContent = chat ? "Message" : "Prompt";
  $("generate").textContent = chat ? "Send" : "Generate";
  $("continue").hidden = chat;
  $("clear").hidden = !chat;
  $("keys-text").hidden = chat;
  $("keys-chat").hidden = !chat;
  $("prompt").value = "";
  attempt(() => inspect({ text: "" }));
}
$("tab-text").onclick = () => choose(false);
$("tab-chat").onclick = () => choose(true);
$("tabs").addEventListener("keydown", (event) => {
  if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
  const tab = state.chat ? $("tab-text") : $("tab-chat");
  tab.focus();
  tab.click();
});

// Light or dark as the system is, until the button is pressed.
const dark = matchMedia("(prefers-color-scheme: dark)");
$("theme").onclick = () => {
  const { style } = document.documentElement;
  const isDark = style.colorScheme ? style.colorScheme === "dark" : dark.matches;
  style.colorScheme = isDark ? "light" : "dark";
  maps.drawAll();
};
dark.addEventListener("change", () => maps.drawAll());

showNext();
refresh();
start();
