"""Speed and memory of pruned against unpruned calls."""
