"""foveate: long contexts on Hugging Face language models, looking sharply only where it matters."""

__version__ = "0.1.0"
