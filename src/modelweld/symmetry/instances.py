"""A transformers architecture from its config, without weights, and an example call for it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modelweld.errors import MergeError

POSITIONS = 8
# What the configs of routed models call the number of their experts.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
# For networks of convolutions, which take images of any size.
PIXELS = 64


def instantiate(config: Any) -> nn.Module:
    """The class the config names (or its backbone), on the meta device: every shape, no memory."""
    import transformers

    names = [name for name in config.architectures or () if hasattr(transformers, name)]
    if names and any(getattr(config, key, None) for key in EXPERTS):
        # Which experts a token goes to is data: only the form that runs on all of them at once can be exported.
        with torch.device("meta"):
            routed: nn.Module = getattr(transformers, names[0])._from_config(
                copy.deepcopy(config), experts_implementation="batched_mm"
            )
        return routed.eval()
    with torch.device("meta"):
        model: nn.Module = (
            getattr(transformers, names[0])(config) if names else transformers.AutoModel.from_config(config)
        )
    return model.eval()


def own_names(module: nn.Module, stored: Iterable[str]) -> dict[str, str]:
    """By the name under which a checkpoint stores a tensor, the name that the module has for it once it is loaded.

    transformers renames on loading and saving. Tensors that it joins or cuts while loading (experts stored one by one)
    have no name of their own in the module and are left out.
    """
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    known = module.state_dict()
    if not isinstance(module, PreTrainedModel):
        return {name: name for name in stored if name in known}
    rules = get_model_conversion_mapping(module)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    found = {}
    for name in stored:
        own, converted = rename_source_key(name, renamings, converters, module.base_model_prefix, known)
        if converted is None and own in known:
            found[name] = own
    return found


def outputs_of(found: Any) -> dict[str, Tensor]:
    """The tensors a model is used for: its logits or embeddings where it has them, else all that it returns.

    Hidden states that come along with logits are not part of the function that a permutation has to keep.
    """
    if isinstance(found, Tensor):
        return {"output": found}
    named = dict(found) if isinstance(found, Mapping) else {str(i): value for i, value in enumerate(found)}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    for ends in ("logits", "_embeds"):
        chosen = {name: value for name, value in tensors.items() if name.endswith(ends)}
        if chosen:
            return chosen
    return tensors


class OutputOnly(nn.Module):
    """A module whose call returns only its answers, so that the exported graph ends there."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return outputs_of(self.module(*args, **kwargs))


def example_inputs(module: nn.Module) -> dict[str, Any]:
    """A keyword call on the module's own device; raises MergeError for models that are not transformers'."""
    config = getattr(module, "config", None)
    if config is None:
        raise MergeError(
            "no example call is known for this module",
            where=type(module).__name__,
            hint="pass `inputs`, a tuple of example tensors",
        )
    device = next(module.parameters()).device
    main = getattr(module, "main_input_name", "input_ids")
    call: dict[str, Any] = {}
    if main == "pixel_values":
        size = getattr(config, "image_size", PIXELS)
        height, width = (size, size) if isinstance(size, int) else size
        # Black images would hide what a wrong group does to the first layer.
        shape = (2, getattr(config, "num_channels", 3), height, width)
        call["pixel_values"] = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
    else:
        ids = (torch.arange(2 * POSITIONS, device=device) % config.vocab_size).reshape(2, POSITIONS)
        call["input_ids"] = ids
        call["attention_mask"] = torch.ones(2, POSITIONS, dtype=torch.long, device=device)
        if getattr(config, "is_encoder_decoder", False):
            call["decoder_input_ids"] = ids.clone()
    if hasattr(config, "use_cache"):
        call["use_cache"] = False
    return call
