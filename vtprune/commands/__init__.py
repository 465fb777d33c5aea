"""One module a command of `vtprune`."""
