"""The browser demo: one question, the unpruned answer beside the pruned ones, and what each of them saw."""
