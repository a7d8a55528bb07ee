"""Do the tests have teeth? Bugs are put into zoo/ one at a time, and each must make the file's check fail."""

import types

import pytest

from tests.conftest import ROOT
from tests.zoo import (
    test_attention_projections,
    test_bigbird,
    test_causal_conv,
    test_gated_deltanet,
    test_mixture_of_experts,
    test_positions,
    test_rank_one_scan,
    test_rwkv7,
    test_scan,
)

CHECKS = {  # file under zoo/ -> what is checked ("": the module), the check
    "positions": ("alibi_slopes", test_positions.check_slopes),
    "mixture_of_experts": ("", test_mixture_of_experts.check),
    "scan": ("scan", test_scan.check),
    "causal_conv": ("causal_conv", test_causal_conv.check),
    "gated_deltanet": ("GatedDeltaNet", test_gated_deltanet.check),
    "attention_projections": ("AttentionProjections", test_attention_projections.check),
    "bigbird": ("BigBird", test_bigbird.check),
    "rank_one_scan": ("rank_one_scan", test_rank_one_scan.check),
    "rwkv7": ("RWKV7", test_rwkv7.check),
}
MUTANTS = [  # file, name, right, wrong
    ("positions", "ALiBi's slopes as MPT's", "4 * h / P for", "8 * h / P for"),
    ("positions", "other heads take each slope of 2P", "2 * (heads - P), 2)", "(heads - P) + 1)"),
    ("positions", "slopes begin with 1", "range(1, P + 1)", "range(P)"),
    ("mixture_of_experts", "probabilities not divided by their sum", "(p / p.sum(-1, keepdim=True))", "p"),
    ("mixture_of_experts", "softmax over the chosen alone, halved", "(p[..., None] * out).sum(2)", "out.mean(2)"),
    ("mixture_of_experts", "tokens in another order", "Rows.apply(out, back, order[:, None])", "out"),
    ("mixture_of_experts", "a token goes to its neighbour's experts", "order // k,", "order // k - 1,"),
    ("mixture_of_experts", "the last expert's tokens to the first", "zip(self.experts,", "zip(self.experts[::-1],"),
    ("mixture_of_experts", "balance not times E", "return E * (f", "return (f"),
    ("mixture_of_experts", "balance over the batch", ".mean(1)).sum(-1)", ".mean((0, 1))).sum(-1)"),
    ("mixture_of_experts", "one choice counts", "F.one_hot(chosen, E).sum(2)", "F.one_hot(chosen[..., 0], E)"),
    ("scan", "a token does not read itself", ".triu(1)", ".triu(0)"),
    ("scan", "a token reads the next one", ".triu(1)", ".triu(2)"),
    ("scan", "no decay of the state that the delta rule reads", "early * b * k), -1)", "b * k), -1)"),
    ("scan", "no decay of the state that is read", "out = (early * q)", "out = q"),
    ("scan", "no decay between chunks", "S = factor * S", "S = S"),
    ("scan", "updates do not decay until the chunk's end", "(whole - log).exp() * k", "k"),
    ("scan", "beta for the values only", "early * b * k), -1)", "early * k), -1)"),
    ("scan", "beta not within the chunk", "(b * k) @ k.mT * mask", "k @ k.mT * mask"),
    ("scan", "no decay within the chunk, delta rule", "(b * k) @ k.mT * mask", "(b * k) @ k.mT"),
    ("scan", "the delta rule within the chunk only", "value - recall @ S", "value"),
    (
        "scan",
        "the state before each chunk is the first",
        "states.append(S)",
        "states.append(states[0] if states else S)",
    ),
    ("scan", "the first state is ignored", "if state is None else upcast(state)", ""),
    ("gated_deltanet", "dt without softplus", "F.softplus(a + self.dt_bias)", "(a + self.dt_bias)"),
    ("gated_deltanet", "no dt_bias", "a + self.dt_bias", "a"),
    ("gated_deltanet", "b and a swapped", "b, a = upcast", "a, b = upcast"),
    ("gated_deltanet", "A without exp", "-upcast(self.A_log).exp()", "upcast(self.A_log)"),
    ("gated_deltanet", "no scale", "unit(q) * D**-0.5", "unit(q)"),
    ("gated_deltanet", "q and k swapped", "q, k, v = F.silu(qkv)", "k, q, v = F.silu(qkv)"),
    ("gated_deltanet", "heads before q, k and v", "qkv.transpose(2, 3).flatten(2)", "qkv.flatten(2)"),
    ("gated_deltanet", "no activation after the convolution", "F.silu(qkv).view", "qkv.view"),
    ("gated_deltanet", "keys of any length", "unit(k), v", "k, v"),
    ("gated_deltanet", "the gate is a sigmoid", "F.silu(z[..., 0, :])", "z[..., 0, :].sigmoid()"),
    ("gated_deltanet", "the state is not kept", "if cache is not None:\n", "if False:\n"),
    ("causal_conv", "the tail is off by one", "x[:, 1 - K :]", "x[:, -K:-1]"),
    ("causal_conv", "no tail", "torch.cat((tail, x), 1)", "torch.cat((0 * tail, x), 1)"),
    ("causal_conv", "the kernel is reversed", "weight[:, :, None].to", "weight.flip(2)[:, :, None].to"),
    ("causal_conv", "it reads the next token", "(0, 0, K - 1, 0)", "(0, 0, K - 2, 1)"),
    ("rank_one_scan", "a reads S after the decay", "(log - decay).exp() * a", "log.exp() * a"),
    (
        "rank_one_scan",
        "one decay for all channels",
        "decay.cumsum(-2)",
        "(0 * decay + decay.mean(-1, True)).cumsum(-2)",
    ),
    ("rank_one_scan", "a reads its own token's value", "(a @ k.mT).tril(-1)", "(a @ k.mT).tril()"),
    ("rank_one_scan", "changes of rank one do not see each other", "-(a @ b.mT)", "-0 * (a @ b.mT)"),
    ("rank_one_scan", "the change has the wrong sign", "-(a @ b.mT)", "(a @ b.mT)"),
    ("rank_one_scan", "q does not read its own token's change", "(q @ b.mT).tril()", "(q @ b.mT).tril(-1)"),
    ("rank_one_scan", "q does not read its own token's value", "(q @ k.mT).tril()", "(q @ k.mT).tril(-1)"),
    ("rank_one_scan", "the change within the chunk only", "values[i] + recalls[i] @ S", "values[i]"),
    ("rank_one_scan", "no decay between chunks", "S = factor * (S", "S = (S"),
    ("rank_one_scan", "the old state alone decays", "factor * (S + b[i].mT @ u", "(factor * S + b[i].mT @ u"),
    ("rank_one_scan", "the first state is ignored", "else upcast(state)", "else 0 * upcast(state)"),
    ("rwkv7", "no token shift", "torch.lerp(x, before", "torch.lerp(x, x"),
    ("rwkv7", "a token and the one before it swapped", "torch.lerp(x, before", "torch.lerp(before, x"),
    ("rwkv7", "the last token of a call is forgotten", "S, x[:, -1:])", "S, 0 * x[:, -1:])"),
    ("rwkv7", "r and g swapped", "xr, xw, xk, xv, xa, xg = ", "xg, xw, xk, xv, xa, xr = "),
    ("rwkv7", "the decay is not bounded", "-(math.e**-0.5) * w.sigmoid()", "-w.exp()"),
    ("rwkv7", "decay without e^-0.5", "-(math.e**-0.5) * w", "-w"),
    ("rwkv7", "decay without tanh", ".tanh()", ""),
    ("rwkv7", "the gate without sigmoid", "(xg @ self.g1).sigmoid()", "(xg @ self.g1)"),
    ("rwkv7", "the corrected key of any length", "kk = F.normalize(kk, dim=-1)", "kk = kk"),
    ("rwkv7", "the corrected key is the written one", "k * self.k_k, k", "k, k"),
    ("rwkv7", "the correction is added", "-kk, kk * a", "kk, kk * a"),
    ("rwkv7", "no rate of correction", "-kk, kk * a", "-kk, kk"),
    ("rwkv7", "the written key without its rate", "k * (1 + (a - 1) * self.k_a)", "k"),
    ("rwkv7", "eps of 1e-5", "64e-5", "1e-5"),
    ("rwkv7", "one group", "nn.GroupNorm(H, H * D", "nn.GroupNorm(1, H * D"),
    ("rwkv7", "no bonus for the token itself", "(r_k * k).sum(-1, keepdim=True) * v", "0 * v"),
    ("rwkv7", "the bonus without its gain", "r * self.r_k)", "r)"),
    ("rwkv7", "no gate", "(out * g)", "(out + 0 * g)"),
    ("attention_projections", "q is not normed", "self.q_norm(q), self", "q, self"),
    (
        "attention_projections",
        "gains of q and k swapped",
        "self.q_norm(q), self.k_norm(k)",
        "self.k_norm(q), self.q_norm(k)",
    ),
    (
        "attention_projections",
        "eps of torch",
        "nn.RMSNorm(D, eps=config.norm_eps) if config.qk_norm else nn.Identity()\n        self.k",
        "nn.RMSNorm(D) if config.qk_norm else nn.Identity()\n        self.k",
    ),
    ("attention_projections", "q and k are not rotated", "(y * cos + y", "(y + 0 * y"),
    ("attention_projections", "the wrong half", "y.roll(self.head_dim // 2, -1)", "y.flip(-1)"),
    ("bigbird", "blocks of 8", "BLOCK = 16", "BLOCK = 8"),
    ("bigbird", "a window of one block", "WINDOW = 2", "WINDOW = 1"),
    ("bigbird", "two random blocks", "RANDOM = 3", "RANDOM = 2"),
    ("bigbird", "no first block", "{0, *drawn", "{*drawn"),
    (
        "bigbird",
        "a block may be drawn twice",
        "while len(drawn) < min(RANDOM, i - WINDOW):",
        "for _ in range(min(RANDOM, i - WINDOW)):",
    ),
    ("bigbird", "the window is drawn from, too", "generator.random() * (i - WINDOW)", "generator.random() * i"),
    ("bigbird", "a query reads later ones of its block", "last % BLOCK + 1", "BLOCK"),
    ("bigbird", "padding is read", "(self.count[last // BLOCK] - 1)", "(WINDOW + RANDOM)"),
    ("bigbird", "all sequences read the first", "* (k.shape[1] // BLOCK)", "* 0"),
    (
        "bigbird",
        "the blocks of another query",
        "self.blocks[last // BLOCK]",
        "self.blocks[(last - 1).clamp(0) // BLOCK]",
    ),
]


@pytest.mark.parametrize(("file", "name", "right", "wrong"), MUTANTS, ids=[f"{m[0]}: {m[1]}" for m in MUTANTS])
def test_a_mutant_is_caught(file, name, right, wrong):
    source = (ROOT / "zoo" / f"{file}.py").read_text()
    assert source.count(right) == 1, f"occurs {source.count(right)} times: {right}"
    mutant = types.ModuleType(f"zoo.{file}")
    exec(compile(source.replace(right, wrong), f"{file}, {name}", "exec"), mutant.__dict__)
    part, check = CHECKS[file]
    with pytest.raises(AssertionError):
        check(getattr(mutant, part) if part else mutant)
