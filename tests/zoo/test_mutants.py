"""Do the tests have teeth? Bugs are put into zoo/ one at a time, and each must make the file's check fail."""

import types

import pytest

from tests.conftest import ROOT
from tests.zoo import test_causal_conv, test_gated_deltanet, test_mixture_of_experts, test_positions, test_scan

CHECKS = {  # file under zoo/ -> what is checked ("": the module), the check
    "positions": ("alibi_slopes", test_positions.check_slopes),
    "mixture_of_experts": ("", test_mixture_of_experts.check),
    "scan": ("scan", test_scan.check),
    "causal_conv": ("causal_conv", test_causal_conv.check),
    "gated_deltanet": ("GatedDeltaNet", test_gated_deltanet.check),
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
