"""Scorers: one method a file. A module in this folder registers its class by itself; nobody keeps a list."""
