"""``foveate bench``: how fast? Time by length and scheme, throughput, a server under load, ops against their limits."""
