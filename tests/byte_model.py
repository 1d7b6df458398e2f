"A language model that can spell anything, in a second"

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def checkpoint(folder):
    "A random one-layer Llama over bytes, with a chat template: it can be asked anything, and knows nothing"
    tok = Tokenizer(
        models.BPE({c: i for i, c in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"])}, [])
    )
    tok.pre_tokenizer, tok.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )
    tok = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        eos_token="<eos>",
        pad_token="<eos>",
        chat_template="{% for m in messages %}{{ m['content'] }}\n\n{% endfor %}",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tok),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=8192,
            eos_token_id=tok.eos_token_id,
            pad_token_id=tok.eos_token_id,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder
