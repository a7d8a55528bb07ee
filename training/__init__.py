"""What train.py uses: configuration, device, optimizers, budget, checkpoints, metrics, processes, fused layers."""
