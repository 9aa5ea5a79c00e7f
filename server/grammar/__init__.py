"""Constrained output: from what a client asks for to a mask over the next token."""
