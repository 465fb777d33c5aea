"""How a set of tokens is made of their scores: one rule a file, filled in by `vtprune.rules.SELECTIONS`."""
