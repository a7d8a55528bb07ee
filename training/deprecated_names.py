"""Old names of configuration fields and of flags (without dashes). An old name is an error that states the new one."""

RENAMED = {
    "optim.decay": "optim.lr_decay_frac",
    "optim.clip": "optim.grad_clip",
    "optim.momentum": "optim.muon_momentum",
    "train.recompute": "train.activation_checkpointing",
    "train.micro_batch": "train.micro_batch_size",
    "train.evals": "train.num_evals",
    "train.keep": "train.keep_checkpoints",
    "tokens": "max-new-tokens",
}
OTHERS = {  # names that other projects have for fields
    "batch_size": "train.batch_tokens", "epochs": "train.steps", "max_iters": "train.steps",
    "block_size": "model.context", "learning_rate": "optim.lr",
}  # fmt: skip
