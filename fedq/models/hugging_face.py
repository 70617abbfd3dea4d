"""Pretrained transformers of Hugging Face, with LoRA adapters."""

import warnings
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from fedq.errors import FedqError, check_choice
from fedq.pretrained import from_pretrained, library

DType = Literal["float32", "bfloat16"]
Attention = Literal["sdpa", "eager"]


def causal_lm(
    base: str,
    adapter: dict[str, Any] | None = None,
    dtype: DType = "float32",
    attention: Attention = "sdpa",
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """Returns a language model: from ids of tokens, int64 (N, T), to logits of the next tokens (N, T, vocabulary).

    Padding must come after the tokens. A token does not see later tokens, so that the model needs no mask.

    base: A name on the hub, a folder, a GGUF file, or PACKAGE:PATH in an installed Python package.
    adapter: Keys of peft.LoraConfig (Hu 2022). All other parameters are frozen. None trains the base.
    dtype: The dtype of the base. Adapters of a bfloat16 base are float32.
    attention: How attention is computed, as of transformers.
    gradient_checkpointing: Whether the backward pass computes activations again, in order to save memory.

    Raises FedqError if the base cannot be loaded, lacks weights, or has no module for the adapter.
    """
    check_choice("attention", attention, Attention)
    network = _loaded("AutoModelForCausalLM", base, dtype, attn_implementation=attention)
    return _with_adapter(network, adapter, "CAUSAL_LM", gradient_checkpointing)


def sequence_classifier(
    num_classes: int,
    base: str,
    adapter: dict[str, Any] | None = None,
    dtype: DType = "float32",
    attention: Attention = "sdpa",
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """Returns a classifier: from ids of tokens, int64 (N, T), to logits (N, num_classes).

    The base's padding id marks padding, which the model does not see. The classes' layer is new: its first weights are
    drawn. The layer trains with the adapters.

    num_classes: The number of classes.

    The other arguments and the errors are those of `causal_lm`.
    """
    check_choice("attention", attention, Attention)
    network = _loaded(
        "AutoModelForSequenceClassification", base, dtype, attn_implementation=attention, num_labels=num_classes
    )
    if (padding := network.config.pad_token_id) is None:
        raise FedqError(f"model.base: {base} has no padding id: set pad_token_id in its config.json")
    model = _with_adapter(network, adapter, "SEQ_CLS", gradient_checkpointing)
    model.register_forward_pre_hook(partial(_mask, padding), with_kwargs=True)
    return model


def _mask(padding: int, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Adds the mask of all tokens except padding."""
    return args, {"attention_mask": (args[0] != padding).long(), **kwargs} if args else kwargs


def _loaded(kind: str, base: str, dtype: DType, **options: Any) -> Any:
    """Returns the pretrained network. Only the classes' layer may be new."""
    check_choice("dtype", dtype, DType)
    network, found = from_pretrained(
        "model.base", kind, base, dtype=getattr(torch, dtype), output_loading_info=True, **options
    )
    inside = network.base_model_prefix + "."
    head = "Classification" in kind
    if lacking := sorted(key for key in found["missing_keys"] if not head or key.startswith(inside)):
        raise FedqError(f"model.base: {base} has no weights for {lacking[0]!r}: give a base of this kind of model")
    network.config.use_cache = False  # only generation uses the cache
    return network


def _with_adapter(network: Any, adapter: dict[str, Any] | None, kind: str, checkpointing: bool) -> nn.Module:
    model: Any = network
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls functions of transformers that will be renamed
        if adapter is not None:
            peft = library("model.adapter", "peft")
            known = {field.name for field in fields(peft.LoraConfig)} - {"task_type", "peft_type"}
            if unknown := sorted(adapter.keys() - known):
                raise FedqError(f"model.adapter.{unknown[0]} is not a key of peft.LoraConfig")
            try:
                model = peft.get_peft_model(network, peft.LoraConfig(task_type=kind, **adapter))
            except Exception as error:  # peft raises many classes of errors
                reason = str(error).strip().split(". ")[0]
                raise FedqError(f"model.adapter: {reason}; the layers are {', '.join(_layers(network))}") from error
        if checkpointing:
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            network.disable_input_require_grads()  # only reentrant checkpoints need gradients of the embeddings
    module: nn.Module = model
    return module


def _layers(network: nn.Module) -> Sequence[str]:
    """Returns the names of layers that may get an adapter."""
    names = [name.rpartition(".")[2] for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return list(dict.fromkeys(names))
