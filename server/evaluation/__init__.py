"""``foveate eval``: does a scheme keep the answer? Tasks made offline from seeds, dense beside sparse."""
