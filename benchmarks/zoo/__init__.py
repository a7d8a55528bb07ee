"""python -m benchmarks zoo: the token mixers of `layer_pattern` compared, one experiment a module.

run.py runs the experiments and describes what one consists of; members.py has the mixers; fit.py trains.
"""

EXPERIMENTS = (
    "recall", "copying", "saturation", "rank_collapse", "entropy_collapse", "text", "length", "decoding",
    "training_time",
)  # fmt: skip
