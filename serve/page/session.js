// What the page knows, and what it asks of the server.

const $ = (id) => document.getElementById(id);
const PAUSE = 150; // milliseconds without a key before a prompt is sent
const RIVALS = 6; // candidates for each token of a stream

const state = {
  run: null, // GET /playground/run
  prompt: null, // what of the text field is shown
  tokens: [], // of the text: { id, text, named, logprob, rivals: [{ id, text, named, logprob }], generated }
  shown: 0, // the maps are those of the tokens from this one on
  next: null, // after the text: all logits in descending order, and the likeliest tokens
  messages: [], // of the chat
  chat: false,
  added: "", // by the model, the last time
  generating: null, // AbortController
  writing: null, // Promise, until a text is written and inspected
  inspecting: null, // AbortController
  inspected: Promise.resolve(), // when the last inspection ends
};
const view = new TextView($("text"), refresh);
const maps = new Maps($("heads"), $("map"), refresh, (query) => view.hover(query < 0 ? -1 : query + state.shown));

// Show how a text looks to the model; of a long one, its last tokens. body: of POST /playground/inspect. before: tokens
// of the text that are not in the body. known: the tokens of the body, if they were shown already.
function inspect(...about) {
  state.inspected = look(...about);
  return state.inspected;
}

async function look(body, before = [], known = []) {
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
  const tokens = found.tokens.map((id, index) => {
    const at = index - found.skipped; // its place among the tokens that were inspected
    return {
      ...token(id, at > 0 ? found.logprobs[at] : known[index]?.logprob),
      rivals: at > 0 ? rivals[at - 1] : known[index]?.rivals ?? [],
      generated: Boolean(known[index]?.generated),
    };
  });
  const inspected = tokens.slice(found.skipped);
  if (body.text !== undefined) state.prompt = body.text;
  state.tokens = [...before, ...tokens];
  state.shown = before.length + found.skipped;
  state.next = { ...sortedLogits(new Float32Array(bytes(found.logits).buffer)), likeliest: rivals.at(-1) };
  view.show(state.tokens, state.shown);
  $("maps").hidden = inspected.length < 2; // a single token attends to itself
  $("no-maps").hidden = !$("maps").hidden;
  maps.set(found.maps, inspected, state.run.mixers);
  maps.drawAll();
  showNext();
}

// Show how the tokens look to the model, without those that are beyond its context.
async function inspectTokens(tokens, selected = -1) {
  const beyond = Math.max(0, tokens.length - state.run.context);
  const rest = tokens.slice(beyond);
  await inspect({ tokens: rest.map(({ id }) => id) }, tokens.slice(0, beyond), rest);
  view.select(selected);
}

// Wait until what is shown is what the user wrote.
async function settle() {
  await state.inspected.catch(() => {}); // it was said to the user
  const text = $("prompt").value;
  if (text !== state.prompt) await inspect({ text });
}

// Let the model continue the text.
async function generate(signal) {
  const { run } = state;
  const { temperature, topK, topP } = settings();
  const prompt = state.tokens.slice(-run.context).map(({ id }) => id);
  const body = {
    model: run.name, prompt, max_tokens: Number($("length").value), temperature, top_k: topK, top_p: topP,
    logprobs: RIVALS, return_token_ids: true,
  };
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
    state.added += choice.text;
    count += choice.token_ids.length;
    say(`${count} tokens …`);
    view.follow();
    refresh();
  }
  say(`${count} tokens`);
}

// Do something that asks the server. Errors are shown to the user.
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
function write(prepare) {
  state.writing = (async () => {
    state.generating = new AbortController();
    state.added = "";
    const { signal } = state.generating;
    busy(true);
    const prepared = await attempt(prepare);
    const size = state.tokens.length;
    const ended = prepared && !signal.aborted && (await attempt(() => generate(signal)));
    if (!ended) say(signal.aborted ? `stopped after ${state.tokens.length - size} tokens` : "");
    if (state.tokens.length > size && (ended || signal.aborted)) {
      await attempt(() => inspectTokens(state.tokens, view.selected));
    }
    state.generating = null;
    busy(false);
  })();
  return state.writing;
}

async function send() {
  if (state.generating) return;
  if (!state.run) return start();
  const content = $("prompt").value.trim();
  if (!state.chat) return write(() => inspect({ text: $("prompt").value }));
  if (!content) return;
  const messages = [...state.messages, { role: "user", content }];
  await write(async () => {
    await inspect({ messages, max_tokens: Number($("length").value) });
    $("prompt").value = "";
  });
  if (state.added.trim()) state.messages = [...messages, { role: "assistant", content: state.added }];
  else if (!$("prompt").value) $("prompt").value = content; // to be sent again
}

// Stop the model. Returns when the text until then is shown.
async function stop() {
  state.generating?.abort();
  await state.writing;
}

// Begin with an empty text or chat.
async function clear() {
  await stop();
  state.messages = [];
  $("prompt").value = "";
  say("");
  await attempt(() => inspect({ text: "" }));
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
  await attempt(async () => {
    if (state.tokens.length) await inspectTokens(state.tokens, view.selected);
    else await inspect({ text: $("prompt").value });
  });
}
