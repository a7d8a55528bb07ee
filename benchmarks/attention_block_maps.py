"""Draw docs/6-block-maps.png: which blocks of the score matrix are skipped, partly masked, or not masked.

Every square is computed from `kernels.reference_attention.attention_mask`, the definition of the mask.
python -m benchmarks.attention_block_maps
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference_attention import CAUSAL, MaskSpec, attention_mask

ROOT = Path(__file__).resolve().parent.parent

SKIPPED, PART, WHOLE = 0, 1, 2
COLOURS = {"skipped": "#eceff1", "partly masked": "#f2a65a", "not masked": "#3a7ca5"}

T, BLOCK_M, BLOCK_N = 512, 32, 32
LENGTHS = 150, 90, 200, 72  # of four packed documents
DOCUMENTS = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))[None]  # (1, T)
MAPS = {
    "causal": (CAUSAL, None),
    "causal, window 128": (MaskSpec(True, 128), None),
    "causal, four documents": (CAUSAL, DOCUMENTS),
    "full, window 64, documents": (MaskSpec(False, 64), DOCUMENTS),
}


def blocks(mask: Tensor, M: int, N: int) -> Tensor:
    """(T, S) bool mask -> (T / M, S / N) values SKIPPED, PART or WHOLE. Positions beyond the edge are ignored."""
    T, S = mask.shape

    def split(padding: bool) -> Tensor:  # -> (blocks of queries, blocks of keys, M * N)
        padded = F.pad(mask, (0, -S % N, 0, -T % M), value=padding)
        return padded.unflatten(1, (-1, N)).unflatten(0, (-1, M)).transpose(1, 2).flatten(2)

    return torch.where(split(False).any(2), torch.where(split(True).all(2), WHOLE, PART), SKIPPED)


def main(path: Path) -> None:
    """Draw all maps side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    figure, axes = plt.subplots(1, len(MAPS), figsize=(12, 3.9), layout="constrained")
    for (title, (mask_spec, document_ids)), axis in zip(MAPS.items(), axes, strict=True):
        mask = attention_mask(mask_spec, T, T, torch.device("cpu"), None, document_ids)[0]
        found = blocks(mask, BLOCK_M, BLOCK_N)
        axis.imshow(found, aspect="auto", cmap=ListedColormap(list(COLOURS.values())), vmin=0, vmax=2)
        axis.set_xticks(torch.arange(found.shape[1] + 1) - 0.5, labels=[])
        axis.set_yticks(torch.arange(found.shape[0] + 1) - 0.5, labels=[])
        axis.grid(color="white", linewidth=0.8)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        share = (found != SKIPPED).float().mean()
        axis.set_title(f"{title}\n{share:.0%} of the blocks computed", fontsize=10)
        axis.set_xlabel("keys", fontsize=9)
    axes[0].set_ylabel("queries", fontsize=9)
    legend = [Patch(color=colour, label=label) for label, colour in COLOURS.items()]
    figure.legend(handles=legend, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    main(ROOT / "docs" / "6-block-maps.png")
