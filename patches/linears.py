"""Finds the linear layers of a model's decoder layers: those that may be replaced by faster ones."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

# What configs call the number of experts: a linear layer of that many outputs chooses among them, and stays exact.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def decoder_linears(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Each linear layer inside a decoder layer, with its parent and its name there."""
    config = model.config.get_text_config()
    experts = {getattr(config, name, None) for name in EXPERTS}
    for layers in model.modules():
        if not isinstance(layers, nn.ModuleList):
            continue
        for layer in layers:
            if not any(isinstance(getattr(inner, "layer_idx", None), int) for inner in layer.modules()):
                continue
            for parent in layer.modules():
                for name, child in parent.named_children():
                    # a subclass computes something else
                    if type(child) is nn.Linear and child.out_features not in experts:
                        yield parent, name, child
