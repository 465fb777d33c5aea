"""What happens to tokens that are not selected: one rule a file, filled in by `vtprune.rules.REMAINDERS`."""
