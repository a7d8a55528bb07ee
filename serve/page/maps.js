// Attention maps: a grid of all heads, layers as rows, and one head enlarged. The last column is the heads' mean; a
// layer with fewer heads than another one leaves columns before it empty.

// A layer's maps as the server packs them (serve/playground.py, pack) -> for each head, and for their mean, the
// largest weight and a byte for each query and each key up to it: row t begins at byte t (t + 1) / 2.
function unpack(layer) {
  const all = bytes(layer.roots);
  const size = all.length / layer.largest.length;
  const rootsOf = (head) => all.subarray(head * size, (head + 1) * size);
  const heads = layer.largest.map((largest, head) => ({ largest, roots: rootsOf(head) }));
  const sum = new Float32Array(size);
  for (const { largest, roots } of heads) {
    for (let at = 0; at < size; at++) sum[at] += largest * (roots[at] / 255) ** 2;
  }
  const most = sum.reduce((a, b) => Math.max(a, b), 1e-30);
  const roots = Uint8Array.from(sum, (value) => Math.round(255 * Math.sqrt(value / most)));
  return [...heads, { largest: most / heads.length, roots }];
}

class Maps {
  // changed() is called when another head is chosen, pointAt(query) when a weight is pointed at, or none, with -1.
  constructor(grid, canvas, changed, pointAt) {
    Object.assign(this, { grid, canvas, changed, pointAt, layer: 0, head: 0, layers: [], tokens: [], size: 0 });
    Object.assign(this, { buttons: [], query: -1, key: -1, pointed: null });
    grid.addEventListener("keydown", (event) => this.move(event));
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => this.point(null));
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
  }

  // maps: of each layer, or null. tokens: T of them. mixers: the name of what mixes the tokens of each layer.
  set(maps, tokens, mixers) {
    this.layers = maps.map((layer) => layer && unpack(layer));
    Object.assign(this, { tokens, size: tokens.length, query: -1, key: -1, pointed: null });
    if (!this.layers[this.layer]) this.layer = Math.max(0, this.layers.findIndex(Boolean));
    this.buttons = this.layers.map((heads, layer) => (heads ?? []).map((_, head) => this.thumbnail(layer, head)));
    const columns = Math.max(1, ...this.buttons.map((row) => row.length));
    this.head = Math.min(this.head, (this.layers[this.layer]?.length ?? 1) - 1);
    this.grid.style.setProperty("--columns", columns);
    this.grid.classList.toggle("sharp", this.size < 64);
    const label = (text, kind) => Object.assign(document.createElement("span"), { textContent: text, className: kind });
    const title = (column) => label(column === columns - 1 ? "mean" : column + 1, "column");
    const titles = Array.from({ length: columns }, (_, column) => title(column));
    const rows = this.buttons.flatMap((row, layer) => {
      const gaps = Array.from({ length: columns - row.length }, () => label("", "gap"));
      const maps = [...row.slice(0, -1), ...gaps, ...row.slice(-1)];
      return [label(layer + 1, "row"), ...(row.length ? maps : [label(`${mixers[layer]}: no map`, "none")])];
    });
    this.grid.replaceChildren(label("", "row"), ...titles, ...rows);
    this.choose(this.layer, this.head);
  }

  isMean(layer, head) {
    return head === (this.layers[layer]?.length ?? 0) - 1;
  }

  nameOf(layer, head) {
    return `layer ${layer + 1}, ${this.isMean(layer, head) ? "mean of all heads" : `head ${head + 1}`}`;
  }

  get name() {
    return this.nameOf(this.layer, this.head);
  }

  thumbnail(layer, head) {
    const button = document.createElement("button");
    const name = this.nameOf(layer, head);
    button.setAttribute("aria-label", `${name[0].toUpperCase()}${name.slice(1)}`);
    button.append(document.createElement("canvas"));
    button.onclick = () => this.choose(layer, head);
    return button;
  }

  choose(layer, head) {
    Object.assign(this, { layer, head });
    this.buttons.flat().forEach((button) => {
      const chosen = button === this.buttons[layer]?.[head];
      button.setAttribute("aria-pressed", String(chosen));
      button.tabIndex = chosen ? 0 : -1;
    });
    this.changed();
  }

  move(event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const [down, right] = steps[event.key];
    let layer = this.layer + down;
    while (this.buttons[layer]?.length === 0) layer += down; // a layer without a map
    const mean = down && this.isMean(this.layer, this.head); // from mean to mean, in whatever column
    const head = mean ? (this.buttons[layer]?.length ?? 0) - 1 : this.head + right;
    const button = this.buttons[layer]?.[head];
    if (!button) return;
    this.choose(layer, head);
    button.focus();
  }

  // The bytes of a query's weights over the keys up to it, and the weights; empty without a map.
  roots(query) {
    const map = this.layers[this.layer]?.[this.head];
    if (!map || query < 0 || query >= this.size) return [];
    return map.roots.subarray((query * (query + 1)) / 2, ((query + 1) * (query + 2)) / 2);
  }

  weights(query) {
    return Array.from(this.roots(query), (root) => this.layers[this.layer][this.head].largest * (root / 255) ** 2);
  }

  // A head's map as an image of T x T pixels: the colour of its canvas, more opaque with the root of the weight.
  paint(canvas, { roots }) {
    const [red, green, blue] = getComputedStyle(canvas).color.match(/[\d.]+/g).map(Number);
    canvas.width = canvas.height = this.size;
    const image = new ImageData(this.size, this.size);
    const { data } = image;
    for (let query = 0, from = 0; query < this.size; query++) {
      for (let key = 0, at = 4 * query * this.size; key <= query; key++) {
        data[at++] = red;
        data[at++] = green;
        data[at++] = blue;
        data[at++] = roots[from++];
      }
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  drawAll() {
    this.buttons.forEach((row, layer) => {
      row.forEach((button, head) => this.paint(button.firstChild, this.layers[layer][head]));
    });
    this.draw();
  }

  // Draw the enlarged map, with the tokens on the axes if there is room, and lines to what is pointed at.
  draw() {
    const source = this.buttons[this.layer]?.[this.head]?.firstChild;
    const side = Math.min(this.canvas.parentElement.clientWidth, 600);
    if (!source?.width || !side) return;
    const context = this.canvas.getContext("2d");
    const scale = devicePixelRatio;
    const labels = (side - 80) / this.size >= 9; // room for a line of text
    this.margin = labels ? 80 : 0;
    this.cell = Math.min(48, (side - this.margin) / this.size);
    const { margin, cell, size } = this;
    this.canvas.width = this.canvas.height = Math.round((margin + size * cell) * scale);
    this.canvas.style.width = this.canvas.style.height = `${margin + size * cell}px`;
    const style = getComputedStyle(this.canvas);
    context.scale(scale, scale);
    context.imageSmoothingEnabled = cell * scale < 1;
    context.drawImage(source, margin, 0, size * cell, size * cell);
    context.fillStyle = context.strokeStyle = style.getPropertyValue("outline-color");
    context.font = `${Math.min(12, cell)}px ${style.fontFamily}`;
    context.textBaseline = "middle";
    if (labels) {
      this.tokens.forEach((token, index) => {
        const text = token.text.trim().replaceAll("\n", "↵") || (token.text.includes("\n") ? "↵" : "·");
        const middle = (index + 0.5) * cell;
        context.textAlign = "right";
        context.globalAlpha = this.query < 0 || index === this.query ? 1 : 0.35;
        context.fillText(text, margin - 6, middle, margin - 8);
        context.save();
        context.translate(margin + middle, size * cell + 6);
        context.rotate(-Math.PI / 2);
        context.globalAlpha = this.query < 0 || index === this.key ? 1 : 0.35;
        context.fillText(text, 0, 0, margin - 8);
        context.restore();
      });
    }
    if (this.query < 0) return;
    context.globalAlpha = 0.8;
    const width = Math.max(cell, 3);
    context.strokeRect(margin, this.query * cell, (this.query + 1) * cell, width);
    if (this.key >= 0) context.strokeRect(margin + this.key * cell, this.key * cell, width, (size - this.key) * cell);
  }

  point(event) {
    const key = event ? Math.floor((event.offsetX - this.margin) / this.cell) : -1;
    const query = event ? Math.floor(event.offsetY / this.cell) : -1;
    const inside = key >= 0 && key <= query && query < this.size;
    this.pointed = inside ? { query, key } : null;
    this.pointAt(inside ? query : -1);
  }
}
