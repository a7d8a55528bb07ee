"""What a run needs beside the model: configuration, machine, optimizers, checkpoints, metrics."""
