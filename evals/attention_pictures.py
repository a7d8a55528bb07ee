"""Attention maps as a picture, and as a page that needs no other file.

Maps are shares with the sign of the map: (H, T, T) for each layer, from -1 to 1. Their square roots are shown, since
most shares are small.
"""

import base64
import json
from pathlib import Path
from typing import Any

from torch import Tensor

TEMPLATE = Path(__file__).with_name("attention_page.html")
COLORS = {"induction": "#c0392b", "previous token": "#2471a3", "first token": "#b7950b", "": "#8a8a8a"}
TICKS = 60  # tokens that an axis can name

Maps = list[Tensor | None]
Names = dict[tuple[int, int], str]  # the pattern of a layer's head, numbers from 1


def visible(piece: str) -> str:
    """A token for an axis: its spaces, line breaks and control characters can be seen; a special token is empty."""
    seen = piece.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥").replace("$", r"\$")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in seen) or "∅"


def draw(path: Path, maps: Maps, names: Names, large: tuple[int, int], pieces: list[str], title: str) -> None:
    """Write a PNG: a row for each layer and a column for each head; on the right the map `large`, with the tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = max(len(found) for found in maps if found is not None)
    side = max(0.4, min(2.2, 6 / len(maps) - 0.3, 9 / columns))  # inches of a small map
    height = max(len(maps) * (side + 0.3) + 0.6, 6.2)
    figure = plt.figure(figsize=(columns * (side + 0.1) + height, height), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=[columns * (side + 0.1), height])
    left, right = parts
    grid = left.subplots(len(maps), columns, squeeze=False)
    for layer, row in enumerate(grid):
        found = maps[layer]
        for head, axis in enumerate(row):
            if found is None or head >= len(found):
                axis.set_visible(False)
                continue
            name = names[layer + 1, head + 1]
            _show(axis, found[head])
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{layer + 1}.{head + 1} {name}", fontsize=7, color=COLORS[name], pad=2)
            for spine in axis.spines.values():
                spine.set(color=COLORS[name], linewidth=1.5 if name else 0.5)
    layer, head = large
    found, axis = maps[layer - 1], right.subplots()
    assert found is not None
    image = _show(axis, found[head - 1])
    step = -(-len(pieces) // TICKS)
    labels = [visible(piece) for piece in pieces[::step]]
    size = max(4, min(9, 300 / len(labels)))
    axis.set_xticks(range(0, len(pieces), step), labels, rotation=90, fontsize=size)
    axis.set_yticks(range(0, len(pieces), step), labels, fontsize=size)
    axis.set(xlabel="attended to", ylabel="token")
    axis.set_title(f"layer {layer}, head {head}  {names[large]}", color=COLORS[names[large]])
    bar = right.colorbar(image, ax=axis, shrink=0.6, pad=0.01)
    ticks = [-1, -0.5, -0.1, 0, 0.1, 0.5, 1] if image.norm.vmin else [0, 0.01, 0.1, 0.25, 0.5, 1]
    bar.set_ticks([(abs(x) ** 0.5) * (1 if x >= 0 else -1) for x in ticks], labels=[f"{x:g}" for x in ticks])
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _show(axis: Any, share: Tensor) -> Any:
    root = share.sign() * share.abs().sqrt()
    signed = bool((share < 0).any())
    return axis.imshow(
        root, cmap="RdBu" if signed else "Blues", vmin=-1 if signed else 0, vmax=1, interpolation="nearest"
    )


def write_page(path: Path, maps: Maps, names: Names, large: tuple[int, int], pieces: list[str], title: str) -> None:
    """Write the HTML page. Square roots of shares are whole numbers up to 127 there."""

    def encoded(found: Tensor) -> str:
        """(H, T, T) -> base64 of int8"""
        root = found.sign() * found.abs().sqrt()
        return base64.b64encode((root * 127).round().char().numpy().tobytes()).decode()

    layers = [
        None if found is None else {
            "heads": len(found), "maps": encoded(found), "names": [names[n + 1, h + 1] for h in range(len(found))],
        }
        for n, found in enumerate(maps)
    ]  # fmt: skip
    data = {"title": title, "tokens": pieces, "large": large, "colors": COLORS, "layers": layers}
    text = json.dumps(data).replace("<", r"\u003c")  # a token may be </script>
    path.write_text(TEMPLATE.read_text(encoding="utf-8").replace("DATA", text), encoding="utf-8")
