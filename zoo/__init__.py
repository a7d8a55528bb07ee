"""Token mixers other than attention, one mechanism a file: the other letters of `layer_pattern`.

A mixer is constructed as Mixer(config, layer) and has

- `forward(x, cos, sin, cache)`: (B, T, C) -> (B, T, C), causal; the same path with and without a cache;
- `state_shapes(config, layer, batch, context)`: shapes of what it keeps between tokens, which KVCache allocates;
- `multiply_adds(config)`: per token at full context, besides those with its weights, for training/flops.py;

and, if it needs them,

- `init_own_weights()`: initial values that differ from those of GPT.init_weights;
- `keeps_keys = True`: it keeps the keys and values of all positions (KVCache.update), not a state (KVCache.replace);
- `unsupported`: names of ModelConfig's fields and values of them that it would ignore.

Other parts of a layer are here, too: mixture_of_experts.py for the feed-forward network, positions.py for RoPE. Nothing
here imports model.py.
"""

from typing import Any

from zoo.additive_attention import AdditiveAttention
from zoo.bigbird import BigBird
from zoo.gated_deltanet import GatedDeltaNet
from zoo.linear_attention import LinearAttention
from zoo.lstm import LSTM
from zoo.mamba2 import Mamba2
from zoo.performer import Performer
from zoo.retention import Retention
from zoo.rwkv7 import RWKV7
from zoo.short_conv import ShortConv
from zoo.topk_memory import TopKMemory

MIXERS: dict[str, type[Any]] = {
    "A": AdditiveAttention,
    "B": BigBird,
    "C": ShortConv,
    "D": GatedDeltaNet,
    "K": LinearAttention,
    "M": Mamba2,
    "P": Performer,
    "Q": TopKMemory,
    "R": LSTM,
    "T": Retention,
    "W": RWKV7,
}
