"""vtprune inside programs that run models themselves; each is imported only by that program."""
