"""One file per scheme; ``sparse_attn/registry.py`` lists them."""
