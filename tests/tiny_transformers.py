"""Tiny pretrained models and tokenizers, in folders as `save_pretrained` writes them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SIZE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 3,
}
SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
TEXT = "To be, or not to be: that is the question. Whether 'tis nobler in the mind to suffer the slings and arrows"


def write_tokenizer(folder: Path) -> None:
    """Writes a tokenizer of at most 300 tokens, whose padding has the id 3."""
    own = Tokenizer(models.BPE(unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE["vocab_size"],
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    own.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)


def write_llama(folder: Path, **options: Any) -> Path:
    """Writes a language model of two layers and its tokenizer, and returns the folder."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZE | {"num_key_value_heads": 2} | options)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_bert(folder: Path, **options: Any) -> Path:
    """Writes an encoder of two layers and its tokenizer, and returns the folder."""
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZE | {"max_position_embeddings": 64} | options)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder
