"""The map that a mixer of zoo/ implies: the matrix by which each head multiplies its values.

Queries, keys and gates fixed, most mixers are linear in the values, and the same for each channel of a head: with
values v (T, D), a head computes M v. Attention's M are its weights. That of a recurrence is never computed, but is
there (Ali et al. 2024, arXiv 2403.01590; Dao & Gu 2024, arXiv 2405.21060, section 4). Here the mixer itself is run with
values that are columns of the identity matrix; its outputs are columns of M, D of them for one run.

    A, B, P, K, Q   weights: none negative, rows sum up to 1
    T, M, D, W      decays, and products of query and key: of any sign and size. Values are those that are written to
                    the state: dt x for Mamba-2. The direct way from a token to its own output, D x_t of Mamba-2 and
                    the bonus of RWKV-7, is not in M
    C, R            none: each channel of a short convolution has a map of its own, an LSTM is not linear

Shapes: T tokens, H heads, K heads of values, D head size.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from model import Attention
from zoo import MIXERS

MODULES: dict[type[Any], tuple[str, str]] = {  # the module that computes the values, the one that reads the outputs
    Attention: ("v_proj", "o_proj"),
    **{MIXERS[letter]: ("v_proj", "o_proj") for letter in "ABKPQ"},
    MIXERS["T"]: ("v_proj", "group_norm"),
    MIXERS["W"]: ("value", "ln_x"),
}
SCANNED = MIXERS["D"], MIXERS["M"]  # whose values are computed by several operations, and go to `scan`
NONE = {MIXERS["C"]: "each channel has a map of its own", MIXERS["R"]: "not linear in any values"}


def implied_map(mixer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """M of each head, (H, T, T) in the dtype of the mixer's sum, for the mixer's input x (1, T, C), and cos and sin as
    for its `forward`. None for a mixer of NONE."""
    if type(mixer) in NONE:
        return None
    T, D = x.shape[1], cos.shape[-1]
    identity, columns = torch.eye(T + D, device=x.device)[:T], []
    for first in range(0, T, D):
        with mixing(mixer, D, identity[:, first : first + D]) as (_, outs):
            mixer(x, cos, sin, None)
        columns += outs  # (T, H, D)
    return torch.cat(columns, 2)[..., :T].transpose(0, 1)  # (T, H, T) -> (H, T, T)


@contextmanager
def mixing(mixer: Any, D: int, values: Tensor | None = None) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """The values (T, K, D) and the outputs (T, H, D) of a mixer, in lists, for each time that it runs meanwhile on one
    sequence. `values` (T, D) take the place of each head's."""
    found_values, outs = list[Tensor](), list[Tensor]()

    def enter(own: Tensor) -> Tensor:
        """own (1, T, ..., K * D) or (1, T, ..., K, D)"""
        if values is not None:
            own = values.to(own.dtype).repeat(1, own[0, 0].numel() // D).view_as(own)  # (T, D) -> (T, K * D) -> own's
        found_values.append(own.reshape(own.shape[1], -1, D))
        return own

    def leave(out: Tensor) -> None:
        outs.append(out.reshape(len(found_values[-1]), -1, D))

    with ExitStack() as stack:
        if type(mixer) in SCANNED:
            module = sys.modules[type(mixer).__module__]
            scan = module.scan

            def observed(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
                out, S = scan(q, k, enter(v), *others)
                leave(out)
                return out, S

            stack.enter_context(mock.patch.object(module, "scan", observed))
        else:
            first, last = (mixer.get_submodule(name) for name in MODULES[type(mixer)])
            stack.callback(first.register_forward_hook(lambda _, inputs, out: enter(out)).remove)
            stack.callback(last.register_forward_pre_hook(lambda _, inputs: leave(inputs[0])).remove)
        yield found_values, outs
