"""`python -m benchmarks gpu`: everything that is measured on a GPU, in one command, see run.py."""

ROW = "ROW "  # a line of a part's output that begins so is a result, in JSON; other lines are its log
