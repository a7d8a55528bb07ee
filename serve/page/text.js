// The text as tokens that can be pointed at, and lists of bars.

// Fill an element with a token's text. Spaces and line breaks are visible, and copied as they are.
function spell(element, token, breaks = false) {
  element.replaceChildren();
  element.classList.toggle("named", Boolean(token.named));
  for (const part of token.text.split(/( |\n)/)) {
    if (part !== " " && part !== "\n") {
      element.append(part);
      continue;
    }
    const mark = element.appendChild(document.createElement("span"));
    mark.className = part === " " ? "space" : "newline";
    mark.textContent = part === " " || breaks ? part : "";
  }
}

// A token's text within a sentence.
function quoted(token) {
  return `“${token.text.replaceAll("\n", "↵")}”`;
}

function percent(p) {
  if (p > 0 && p < 0.001) return "<0.1%";
  return `${p >= 0.1 || p === 0 ? (100 * p).toFixed(0) : (100 * p).toPrecision(2)}%`;
}

// Fill a list with bars. rows: of { token, p, before, chosen }; `before` is marked on the bar, if given.
// pick(row) is called for a row that was clicked; without it, the rows cannot be clicked.
function showBars(list, rows, pick) {
  const most = Math.max(1e-9, ...rows.map((row) => Math.max(row.p, row.before ?? 0)));
  const items = rows.map((row) => {
    const item = document.createElement("li");
    const button = item.appendChild(document.createElement("button"));
    const [name, track, value] = ["name", "track", "value"].map((kind) => {
      const part = button.appendChild(document.createElement("span"));
      part.className = kind;
      return part;
    });
    spell(name, row.token);
    track.appendChild(document.createElement("i")).style.width = `${(100 * row.p) / most}%`;
    if (row.before !== undefined) {
      track.appendChild(document.createElement("b")).style.left = `${(100 * row.before) / most}%`;
    }
    value.textContent = row.p === 0 ? "–" : percent(row.p);
    button.disabled = !pick;
    button.onclick = () => pick(row);
    item.classList.toggle("chosen", Boolean(row.chosen));
    item.classList.toggle("out", row.p === 0);
    return item;
  });
  list.replaceChildren(...items);
}

// The tokens in their element. `selected` is kept until another is selected; a token that is pointed at, `hovered`,
// comes first. changed() is called when either changes.
class TextView {
  constructor(element, changed) {
    this.element = element;
    this.changed = changed;
    this.clear();
    const at = (event) => this.nodes.indexOf(event.target.closest("[role=option]"));
    element.addEventListener("pointerover", (event) => event.pointerType === "mouse" && this.hover(at(event)));
    element.addEventListener("pointerleave", () => this.hover(-1));
    element.addEventListener("click", (event) => {
      if (getSelection().isCollapsed) this.select(at(event) === this.selected ? -1 : at(event));
    });
    element.addEventListener("keydown", (event) => this.key(event));
  }

  // The token that is inspected, or -1.
  get current() {
    return this.hovered >= 0 ? this.hovered : this.selected;
  }

  clear() {
    this.nodes = [];
    this.hovered = this.selected = -1;
    this.turn = this.element;
    this.element.replaceChildren();
  }

  // Show other tokens. Those before `first` are not inspected.
  show(tokens, first) {
    const { scrollTop } = this.element;
    this.clear();
    tokens.forEach((token) => this.add(token));
    this.nodes.slice(0, first).forEach((node) => node.classList.add("outside"));
    this.element.scrollTop = scrollTop;
    this.mark();
  }

  // Scroll to the end, where tokens are added.
  follow() {
    this.element.scrollTop = this.element.scrollHeight;
  }

  // Append a token. A turn of a chat begins on its own line.
  add(token) {
    if (token.named && token.text === "<|im_start|>") {
      this.turn = this.element.appendChild(document.createElement("div"));
      this.turn.className = "turn";
      this.turn.setAttribute("role", "group");
    }
    const node = this.turn.appendChild(document.createElement("span"));
    spell(node, token, true);
    node.id = `token-${this.nodes.length}`;
    node.setAttribute("role", "option");
    node.setAttribute("aria-selected", "false");
    node.classList.toggle("given", !token.generated && !token.named);
    this.nodes.push(node);
  }

  // Shade each token by a number from 0 to 1.
  shade(weights) {
    this.nodes.forEach((node, index) => node.style.setProperty("--weight", (weights[index] ?? 0).toFixed(3)));
  }

  hover(index) {
    this.hovered = index;
    this.mark();
  }

  select(index) {
    this.selected = index;
    this.mark();
  }

  mark() {
    this.nodes.forEach((node, index) => {
      node.setAttribute("aria-selected", String(index === this.selected));
      node.classList.toggle("current", index === this.current);
    });
    const node = this.nodes[this.selected];
    if (node) this.element.setAttribute("aria-activedescendant", node.id);
    else this.element.removeAttribute("aria-activedescendant");
    this.changed();
  }

  key(event) {
    const last = this.nodes.length - 1;
    const here = this.selected;
    const next = {
      ArrowLeft: () => Math.max(0, here - 1), ArrowRight: () => Math.min(last, here + 1), Home: () => 0,
      ArrowUp: () => this.line(here, -1), ArrowDown: () => this.line(here, 1), End: () => last,
    }[event.key];
    if (!next || last < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.hovered = -1;
    this.select(here < 0 ? last : next());
    this.nodes[this.selected].scrollIntoView({ block: "nearest" });
  }

  // The nearest token in the next line of the page, upwards (-1) or downwards (1).
  line(here, step) {
    const from = this.nodes[here];
    let best = here;
    for (let index = here + step, top = null; index >= 0 && index < this.nodes.length; index += step) {
      const { offsetTop, offsetLeft } = this.nodes[index];
      if (offsetTop === from.offsetTop) continue;
      top ??= offsetTop;
      if (offsetTop !== top) break;
      const nearer = Math.abs(offsetLeft - from.offsetLeft) < Math.abs(this.nodes[best].offsetLeft - from.offsetLeft);
      if (this.nodes[best].offsetTop !== top || nearer) best = index;
    }
    return best;
  }
}
