"""The token mixers that are compared, with equal numbers of parameters, and the memory that each needs in inference.

A member is a name and the fields of ModelConfig in which it differs from softmax attention.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from model import ModelConfig
from training.flops import count_parameters
from zoo import MIXERS

BASELINE = "softmax attention"
TOLERANCE = 0.005  # relative difference in parameters from the baseline

ALL: dict[str, dict[str, Any]] = {
    BASELINE: {"layer_pattern": "L"},
    "Gated DeltaNet": {"layer_pattern": "D"},
    "Mamba-2": {"layer_pattern": "M"},
    "linear attention": {"layer_pattern": "K"},
    "retention": {"layer_pattern": "T"},
    "RWKV-7": {"layer_pattern": "W"},
    "LSTM": {"layer_pattern": "R"},
    "sliding window": {"layer_pattern": "S"},  # config() sets the window
    "multi-query attention": {"layer_pattern": "L", "n_kv_head": 1},
    "hybrid DDDL": {"layer_pattern": "DDDL"},
    "hybrid MMML": {"layer_pattern": "MMML"},
    "short convolution": {"layer_pattern": "C"},
    # with a single head, as in the paper; it has no rotary positions
    "additive attention": {"layer_pattern": "A", "n_head": 1, "n_kv_head": 1, "positions": "sinusoidal"},
    "LSTM, additive attention": {"layer_pattern": "RA", "n_head": 1, "n_kv_head": 1},  # Bahdanau et al. 2015, with GRUs
    "dot product, unscaled": {"layer_pattern": "L", "scale_scores": False, "qk_norm": False},  # Luong et al. 2015
    "BigBird": {"layer_pattern": "B"},
    "top-k memory": {"layer_pattern": "Q"},
    "Performer": {"layer_pattern": "P"},
}
MEMBERS = {name: fields for name, fields in ALL.items() if set(fields["layer_pattern"]) <= {"L", "S", *MIXERS}}


def chosen(names: Iterable[str], only: Sequence[str] = ()) -> list[str]:
    """Those of the names that are members and, if `only` is not empty, are in it by name or layer_pattern."""
    return [n for n in names if n in MEMBERS and (not only or {n, MEMBERS[n]["layer_pattern"]} & set(only))]


def config(member: str, base: ModelConfig, first: str = "") -> ModelConfig:
    """The configuration of a member, with n_ffn such that it has as many parameters as softmax attention.

    Args:
        base: of softmax attention; gives all sizes.
        first: letters of layers before the member's, in both.
    Raises:
        ValueError: there is no n_ffn for which the numbers agree within TOLERANCE.
    """
    fields = dict(MEMBERS[member])
    fields["layer_pattern"] = first + fields["layer_pattern"]
    if "S" in fields["layer_pattern"]:
        fields["window"] = max(base.context // 8, 1)
    target = count_parameters(dataclasses.replace(base, layer_pattern=first + "L"))
    made = dataclasses.replace(base, **fields)
    per_unit = 3 * base.n_layer * base.n_embd  # parameters of n_ffn + 1 compared with n_ffn
    n_ffn = base.n_ffn + round((target - count_parameters(made)) / per_unit)
    made = dataclasses.replace(made, n_ffn=max(n_ffn, 1))
    if abs(count_parameters(made) - target) > TOLERANCE * target:
        raise ValueError(f"{member}: no n_ffn gives it the {target:,} parameters of {BASELINE} within {TOLERANCE:.1%}")
    return made


def state_bytes(config: ModelConfig, context: int) -> int:
    """Bytes that a sequence of `context` tokens keeps in inference: keys and values, or states, in fp32."""
    numbers = 0
    for layer in range(config.n_layer):
        window = config.mask_spec(layer).window or context  # without the room for new tokens in KVCache's ring buffer
        shapes = config.mixer(layer).state_shapes(config, layer, 1, min(window, context))
        numbers += sum(map(math.prod, shapes))
    return 4 * numbers
