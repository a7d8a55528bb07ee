"""heed's model: a decoder-only transformer that is, parameter for parameter, Hugging Face's Qwen3ForCausalLM.

    tokens -> embedding -> n_layer x [ x + attention(norm(x));  x + swiglu(norm(x)) ] -> norm -> logits

Every class is one idea. Shapes in the comments:
B batch, T time (tokens in this call), C width (n_embd), H query heads, K key/value heads, D head size, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import CAUSAL, DocumentBounds, MaskSpec, attention, document_bounds
from kernels.cross_entropy import linear_cross_entropy
from kernels.kv_cache import KVCache
from zoo import MIXERS
from zoo.mixture_of_experts import MixtureOfExperts, load_balancing_loss
from zoo.positions import POSITIONS, alibi_slopes, position_embedding

# 1. Configuration ---------------------------------------------------------------------------------------------------

MAX_SIZE = 2**31 - 1  # of every whole number in a model's configuration


def check_numbers(config: Any, section: str, largest: int = 2**53) -> None:
    """Raise ValueError if a number of a configuration (a dataclass) is not finite, or larger than `largest`."""
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{section}.{name} = {value!r}: must be a finite number")
        if isinstance(value, int) and abs(value) > largest:
            raise ValueError(f"{section}.{name} = {value!r}: must be at most {largest}")


@dataclass(frozen=True)
class ModelConfig:
    """Hyperparameters of the model; saved next to its weights."""

    vocab_size: int = 0
    """tokens in the vocabulary; 0 takes the tokenizer's size"""
    context: int = 256
    """context length in tokens, in training and in generation"""
    n_layer: int = 6
    """transformer blocks"""
    n_head: int = 6
    """query heads per layer"""
    n_kv_head: int = 6
    """key/value heads per layer; fewer than n_head is grouped-query attention (GQA), 1 is multi-query"""
    n_embd: int = 384
    """width of the residual stream"""
    head_dim: int = 64
    """size of one head; n_head * head_dim need not be n_embd"""
    n_ffn: int = 1024
    """hidden width of the feed-forward (SwiGLU) layer, or of each of its experts"""
    n_expert: int = 0
    """experts per layer: feed-forward networks of which a router chooses for each token; 0 is one network for all"""
    n_expert_active: int = 0
    """experts per token; needed if n_expert is above 0"""
    router_aux_loss_coef: float = 0.01
    """weight of the load-balancing loss of the experts, in training"""
    tie_embeddings: bool = True
    """use the token embedding as the output head"""
    dropout: float = 0.0
    """probability of zeroing an activation after the embedding, each attention and each feed-forward, in training"""
    attention_dropout: float = 0.0
    """probability of zeroing a weight of attention's softmax, in training"""
    window: int = 0
    """keys that a sliding-window layer attends to, the query's own included; needed if layer_pattern has an S"""
    layer_pattern: str = "L"
    """repeated over the layers: L attends to the whole context, S to a sliding window ("SSSL": three S, one L); other
    letters replace attention: A is additive attention, B BigBird, C a short convolution, D Gated DeltaNet, K linear
    attention, M Mamba-2, P Performer, Q a top-k memory, R an LSTM, T retention, W RWKV-7 (zoo/)"""
    qk_norm: bool = True
    """normalize queries and keys (QK-norm); false is Llama's attention"""
    gate: bool = False
    """multiply attention's output by a learned sigmoid gate of its input"""
    scale_scores: bool = True
    """divide attention's scores by sqrt(head_dim)"""
    positions: str = "rope"
    """rope (rotary) | none | sinusoidal or learned (added to the embedding) | alibi (a bias on attention's scores)"""
    rope_theta: float = 10000.0
    """base of the rotary wavelengths"""
    yarn_factor: float = 1.0
    """extend the context beyond yarn_original_context by this factor, with YaRN; 1 is off"""
    yarn_original_context: int = 0
    """context length that the weights were trained with, at least 7, if yarn_factor is not 1"""
    norm_eps: float = 1e-6
    """added to the mean square in RMSNorm"""

    def __post_init__(self) -> None:
        def must(holds: bool, field: str, why: str) -> None:
            if not holds:
                raise ValueError(f"model.{field} = {getattr(self, field)!r}: {why}")

        check_numbers(self, "model", MAX_SIZE)
        for field in ("context", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_ffn"):
            must(getattr(self, field) >= 1, field, "must be at least 1")
        must(self.n_layer <= 10_000, "n_layer", "must be at most 10000")
        must(self.vocab_size >= 0, "vocab_size", "must be at least 1, or 0 for the tokenizer's size")
        must(self.n_head % self.n_kv_head == 0, "n_kv_head", f"must divide model.n_head = {self.n_head}")
        must(self.head_dim % 2 == 0, "head_dim", "must be even: RoPE rotates pairs of dimensions")
        for field in ("dropout", "attention_dropout"):
            must(0.0 <= getattr(self, field) < 1.0, field, "must be at least 0 and below 1")
        letters = ["L", "S", *MIXERS]
        known = bool(self.layer_pattern) and set(self.layer_pattern) <= set(letters)
        must(known, "layer_pattern", f"must consist of {', '.join(letters[:-1])} and {letters[-1]}")
        must(self.window >= 1 or "S" not in self.layer_pattern, "window", "must be at least 1: layer_pattern has an S")
        must(self.window == 0 or "S" in self.layer_pattern, "window", "has no effect: layer_pattern has no S")
        must(0 <= self.n_expert <= 10_000, "n_expert", "must be from 0 to 10000")
        must(0 <= self.n_expert_active <= self.n_expert, "n_expert_active", "must be from 1 to model.n_expert")
        must(not self.n_expert or self.n_expert_active > 0, "n_expert", "needs model.n_expert_active, at least 1")
        must(self.router_aux_loss_coef >= 0.0, "router_aux_loss_coef", "must be at least 0")
        must(self.positions in POSITIONS, "positions", f"must be {', '.join(POSITIONS[:-1])} or {POSITIONS[-1]}")
        for letter in self.layer_pattern:
            for field, value in getattr(MIXERS.get(letter), "unsupported", {}).items():
                why = f"{MIXERS[letter].__name__}, {letter} in layer_pattern, does not support it"
                must(getattr(self, field) != value, field, why)
        softmax = set(self.layer_pattern) <= {"L", "S"}
        must(not self.attention_dropout or softmax, "attention_dropout", "goes with the layers L and S only")
        must(self.rope_theta > 1.0, "rope_theta", "must be above 1")
        must(self.norm_eps > 0.0, "norm_eps", "must be above 0")
        must(self.yarn_factor >= 1.0, "yarn_factor", "must be at least 1")
        yarn, original = self.yarn_factor > 1.0, self.yarn_original_context
        must(not yarn or self.positions == "rope", "yarn_factor", "goes with positions = 'rope'")
        must(original >= 7 if yarn else not original, "yarn_original_context", "at least 7 with yarn_factor, else 0")

    def letter(self, layer: int) -> str:
        """The letter of layer number `layer`."""
        return self.layer_pattern[layer % len(self.layer_pattern)]

    def mixer(self, layer: int) -> type[Any]:
        """The class that mixes the tokens of a layer: Attention, or one of zoo/."""
        return MIXERS.get(self.letter(layer), Attention)

    def mask_spec(self, layer: int) -> MaskSpec:
        """The attention mask of a layer."""
        return MaskSpec(causal=True, window=self.window) if self.letter(layer) == "S" else CAUSAL


# 2. Positions: rotary embeddings ------------------------------------------------------------------------------------


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Angle per position of each pair of dimensions, (D/2,) fp32 in radians, and the factor on cos and sin.

    Plain RoPE (Su et al. 2021, eq. 15): theta ** (-2i / D). YaRN (Peng et al. 2023, section 3.2 and eq. 22): pairs
    that rotate more than 32 times within the original context keep their angle, pairs that rotate less than once are
    slowed by the factor, those between are interpolated; attention's temperature is a factor on cos and sin. With other
    `positions` all angles are 0: nothing is rotated.
    """
    D, theta = config.head_dim, config.rope_theta
    if config.positions != "rope":
        return torch.zeros(D // 2), 1.0
    frequencies = theta ** (-torch.arange(0, D, 2, dtype=torch.float32) / D)  # (D/2,), fastest first
    if config.yarn_factor == 1.0:
        return frequencies, 1.0

    def pair_that_rotates(times: float) -> float:
        return D * math.log(config.yarn_original_context / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(pair_that_rotates(32)), 0), min(math.ceil(pair_that_rotates(1)), D - 1)
    pairs = torch.arange(D // 2, dtype=torch.float32)
    slowed = ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)  # (D/2,) 0 keeps, 1 slows
    return frequencies * (1 - slowed + slowed / config.yarn_factor), 0.1 * math.log(config.yarn_factor) + 1.0


def precompute_rope(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, (context, D) fp32 each, in the layout of `apply_rotary_emb`: the second half of D
    repeats the first, and the first half of sin is negated."""
    frequencies, factor = rope_frequencies(config)
    angles = torch.outer(torch.arange(config.context, dtype=torch.float32), frequencies)  # (context, D/2)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate dimensions i and i + D/2 by the angle of their position. x (B, T, H, D); cos, sin (B or 1, T, 1, D)."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin  # a compiler fuses a roll, but not a concatenation of halves


# 3. The transformer -------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with RMS-normed queries and keys (Henry et al. 2020), then RoPE.

    With `gate`, q_proj also computes a gate for each head's output (Qiu et al. 2025, arXiv 2505.06708, "G1"), laid
    out as in Qwen3-Next: a head's D query rows, then its D gate rows.
    """

    keeps_keys = True  # see zoo/__init__.py
    alibi_slopes: Tensor | None

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        C, H, K, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.layer, self.head_dim, self.gate, self.mask_spec = layer, D, config.gate, config.mask_spec(layer)
        self.softmax_scale, self.dropout = D**-0.5 if config.scale_scores else 1.0, config.attention_dropout
        self.attend = attention  # or of several devices, see kernels/context_parallel.py
        self.register_buffer("alibi_slopes", alibi_slopes(H) if config.positions == "alibi" else None, persistent=False)
        self.q_proj = nn.Linear(C, H * D * (2 if config.gate else 1), bias=False)
        self.k_proj = nn.Linear(C, K * D, bias=False)
        self.v_proj = nn.Linear(C, K * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)
        self.q_norm = nn.RMSNorm(D, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(D, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    @staticmethod
    def state_shapes(config: ModelConfig, layer: int, batch: int, context: int) -> list[tuple[int, ...]]:
        """Shapes of the keys and values in a KVCache with room for `context` tokens."""
        window = config.mask_spec(layer).window
        size = context if window is None else min(context, window + KVCache.CHUNK - 1)
        return [(batch, size, config.n_kv_head, config.head_dim)] * 2  # (B, S, K, D)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x (B, T, C) -> q (B, T, H, D), k and v (B, T, K, D), and the gate before its sigmoid (B, T, H, D), if any."""
        (B, T, _), gate = x.shape, None
        q = self.q_proj(x).view(B, T, -1, self.head_dim * (2 if self.gate else 1))  # (B, T, H*D) -> (B, T, H, D or 2D)
        if self.gate:
            q, gate = q.chunk(2, dim=-1)  # (B, T, H, D) each
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K*D) -> (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K*D) -> (B, T, K, D)
        q, k = apply_rotary_emb(self.q_norm(q), cos, sin), apply_rotary_emb(self.k_norm(k), cos, sin)
        return q, k, v, gate

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None, **options: Any) -> Tensor:
        (B, T, _), lengths, block_table = x.shape, None, None
        q, k, v, gate = self.project(x, cos, sin)
        if cache is not None:
            (k, v), lengths = cache.update(self.layer, k, v), cache.lengths + T  # (B, S, K, D)
            block_table = cache.block_table
        out = self.attend(
            q, k, v, self.mask_spec, softmax_scale=self.softmax_scale, cache_seqlens=lengths, block_table=block_table,
            alibi_slopes=self.alibi_slopes, dropout_p=self.dropout if self.training else 0.0, **options,
        )  # fmt: skip  # (B, T, H, D)
        if gate is not None:
            out = out * gate.sigmoid()
        return self.o_proj(out.reshape(B, T, -1))  # (B, T, H, D) -> (B, T, H*D) -> (B, T, C)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_ffn, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_ffn, bias=False)
        self.down_proj = nn.Linear(config.n_ffn, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (B, T, C) -> (B, T, n_ffn) -> (B, T, C)


class Block(nn.Module):
    """One layer: attention, then the feed-forward network, each with a pre-norm and a residual connection."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.self_attn = config.mixer(layer)(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MixtureOfExperts(config, FeedForward) if config.n_expert else FeedForward(config)
        self.dropout = config.dropout

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, **options: Any) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), cos, sin, cache, **options)
        x = x + F.dropout(attended, self.dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)


class Decoder(nn.Module):
    """Embedding, blocks and the final norm; called `model`, as in Hugging Face's checkpoints."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.activation_checkpointing = False  # in training, recompute a layer's activations in the backward pass
        self.document_start: int | None = None  # the token that starts a document; nothing before it is attended to
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.embed_positions = position_embedding(config)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        cos, sin = precompute_rope(config)
        self.register_buffer("cos", cos, persistent=False)  # (context, D)
        self.register_buffer("sin", sin, persistent=False)

    def documents(self, tokens: Tensor) -> DocumentBounds | None:
        """The documents of whole sequences (B, T), between which there is no attention; None: no such limit."""
        start = self.document_start
        return None if start is None else document_bounds((tokens == start).cumsum(1))

    def forward(
        self, tokens: Tensor, cache: KVCache | None = None, positions: Tensor | None = None,
        documents: DocumentBounds | None = None
    ) -> Tensor:  # fmt: skip
        """tokens (B, T) -> hidden states, the input of the head, (B, T, C). Raises ValueError: too many tokens.

        positions: of the tokens, (B or 1, T); by default they are consecutive, from 0 or after those in the cache.
        documents: by default those of the tokens.
        """
        T, context = tokens.shape[1], self.cos.shape[0]
        most = context if cache is None else min(context, KVCache.CHUNK)
        if most < T:
            raise ValueError(f"{T} tokens at once, but at most {most} fit")
        if positions is None:  # (B or 1, T)
            positions = torch.arange(T, device=tokens.device)[None] if cache is None else cache.positions(T)
        x = self.embed_tokens(tokens)  # (B, T) -> (B, T, C)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions).to(x.dtype)
        x = F.dropout(x, self.dropout, self.training)
        cos, sin = (table[positions][:, :, None].to(x.dtype) for table in (self.cos, self.sin))  # (B or 1, T, 1, D)
        if documents is None and cache is None:
            documents = self.documents(tokens)
        options: dict[str, Any] = {} if documents is None else {"document_ids": documents}  # zoo/ does not accept it
        for layer in self.layers:
            if self.activation_checkpointing and self.training:  # Chen et al. 2016, arXiv 1604.06174
                x = checkpoint(layer, x, cos, sin, use_reentrant=False, **options)
            else:
                x = layer(x, cos, sin, cache, **options)
        return self.norm(x)


class GPT(nn.Module):
    """The language model: `logits = model(tokens)`, `loss = model.loss(tokens, targets)`."""

    def __init__(self, config: ModelConfig) -> None:
        """Raises ValueError if vocab_size is still 0."""
        super().__init__()
        if config.vocab_size == 0:
            raise ValueError("model.vocab_size = 0: must be the tokenizer's size")
        self.config = config
        self.model = Decoder(config)
        # With tied embeddings there is no second matrix, and none in the checkpoint.
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialize all weights.

        Matrices are normal with standard deviation 1/sqrt(fan-in), so that unit inputs give unit outputs; the two that
        write to the residual stream are divided by sqrt(2 n_layer), so that the sum of all layers stays near one
        (Radford et al. 2019, section 2.3). Embedding and head are small, so that the logits start near 0.
        """
        for name, p in self.named_parameters():
            if p.ndim == 1:
                nn.init.ones_(p)  # RMSNorm gains
            elif name.endswith(("embed_tokens.weight", "embed_positions.weight", "lm_head.weight")):
                nn.init.normal_(p, std=0.02)
            else:
                residual = name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=(p[0].numel() * (2 * self.config.n_layer if residual else 1)) ** -0.5)
        for module in self.modules():
            if callable(initialize := getattr(module, "init_own_weights", None)):  # of zoo/
                initialize()

    @property
    def head_weight(self) -> Tensor:
        """(V, C): the embedding's weight if tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def head(self, x: Tensor) -> Tensor:
        """(..., C) -> logits (..., V)."""
        return F.linear(x, self.head_weight)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits of the next token at every position.

        Args:
            tokens: (B, T) integers; T at most the context, and with a cache at most KVCache.CHUNK.
            cache: updated, not advanced; the tokens follow those in the cache. They must fit into the context, which
                is not checked here: a check would synchronize with the device.
        Returns:
            (B, T, V).
        Raises:
            ValueError: too many tokens.
        """
        return self.head(self.model(tokens, cache))

    def next_logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Logits after the last of the tokens (B, T), (B, V) fp32. For the rest see `forward`."""
        return self.head(self.model(tokens, cache)[:, -1]).float()  # (B, T, C) -> (B, C) -> (B, V)

    def loss(self, tokens: Tensor, targets: Tensor, **of_tokens: Any) -> Tensor:
        """Sum of the cross-entropies of targets (B, T), in nats, fp32; a target of IGNORE_INDEX (-100) is left out.

        of_tokens: positions and documents, see `Decoder.forward`.
        In training, the load-balancing loss of experts is added, times its coefficient and the number of targets.
        """
        x = self.model(tokens, **of_tokens).flatten(0, 1)  # (B, T, C) -> (B * T, C)
        loss = linear_cross_entropy(x, self.head_weight, targets.flatten())
        if self.training and self.config.n_expert:
            loss = loss + self.config.router_aux_loss_coef * load_balancing_loss(self.model.layers, targets)
        return loss
