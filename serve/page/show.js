// What is shown.

function settings() {
  const value = (id) => Number($(id).value);
  return { temperature: value("temperature"), topK: value("top-k"), topP: value("top-p") };
}

function say(text) {
  $("status").textContent = text;
}

// Whether the model writes. The focus stays on a button that can be pressed.
function busy(is) {
  const focused = document.activeElement;
  $("stop").hidden = !is;
  if (is && (focused === $("generate") || focused === $("continue"))) $("stop").focus();
  $("generate").disabled = $("continue").disabled = $("prompt").readOnly = is;
  if (!is && focused === $("stop")) $("generate").focus();
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
  const { current } = view;
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
  title.append(token.logprob == null ? (index ? " has no probability here" : " begins the text") : ` ${percent(Math.exp(token.logprob))}`);
  const row = (each) => ({ token: each, p: Math.exp(each.logprob), chosen: same(each, token) });
  const rivals = token.rivals.map(row);
  if (token.logprob != null && !rivals.some(({ chosen }) => chosen)) rivals.push(row(token));
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
  const append = ({ token }) => branch(state.tokens.length, token);
  showBars($("next").querySelector(".bars"), rows, !state.chat && append);
}
