"""A tiny random Llama, T5 and BERT as folders, with a real tokenizer trained on a few sentences, and data files."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

PAD, EOS, BOS = 0, 1, 2
LABELS = ("bad", "fine", "very bad")
"""One and two tokens long; in T5, where no space goes before an answer, two and two."""
SENTENCES = (
    "what a bad film this was", "a fine film with a fine cast", "the plot is bad and the end is worse",
    "very bad acting and a very bad plot", "I liked the music and the cast", "the best film of the year",
    "Text: Sentiment: Label: very good", "question and answer: what is two and three",
    "Classify the text. Answer with one of: bad, fine, very bad.",
)  # fmt: skip
WORDS = ("film", "cast", "plot", "music", "end", "acting", "year", "answer", "question", "text")
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tokenizer(
    *, bos: bool = False, eos: bool = False, chat: bool = False, pairs: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text can be written, and spaces belong to words as in GPT-2 or Llama 3."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=420, show_progress=False, special_tokens=["<pad>", "<eos>", "<bos>", "<|user|>", "<|assistant|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    single = ("<bos> " if bos else "") + "$A" + (" <eos>" if eos else "")
    pair = {"pair": single + " $B:1 <eos>:1"} if pairs else {}
    specials = [("<bos>", BOS), ("<eos>", EOS)]
    raw.post_processor = processors.TemplateProcessing(single=single, **pair, special_tokens=specials)
    more = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]} if pairs else {}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", **more
    )
    if chat:
        fast.chat_template = CHAT
    return fast


def save_llama(
    folder: Path,
    *,
    context: int = 128,
    chat: bool = True,
    seed: int = 0,
    width: int = 32,
    layers: int = 2,
    inner: int = 48,
) -> Path:
    words = tokenizer(bos=True, chat=chat)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, initializer_range=0.1, tie_word_embeddings=True,
        pad_token_id=PAD, eos_token_id=EOS, bos_token_id=BOS,
    )  # fmt: skip
    return _save(LlamaForCausalLM, config, words, folder, seed)


def save_t5(folder: Path, *, seed: int = 0) -> Path:
    words = tokenizer(eos=True)
    config = T5Config(
        vocab_size=len(words), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
        dropout_rate=0.0, initializer_factor=1.5, pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD,
    )  # fmt: skip
    return _save(T5ForConditionalGeneration, config, words, folder, seed)


def save_mt5(folder: Path, *, width: int = 32) -> Path:
    """With a head of its own, which transformers ties away."""
    words = tokenizer(eos=True)
    config = MT5Config(
        vocab_size=len(words), d_model=width, d_kv=16, d_ff=128, num_layers=2, num_decoder_layers=2, num_heads=4,
        dropout_rate=0.0, pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD,
    )  # fmt: skip
    _save(MT5ForConditionalGeneration, config, words, folder, 0)
    tensors = load_file(folder / "model.safetensors")
    head = torch.randn(len(words), width, generator=torch.Generator().manual_seed(1))
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    return folder


def save_gguf(folder: Path, path: Path) -> Path:
    """A folder's Llama and its tokenizer as GGUF, in float32; with as many key heads as heads no row has to be moved."""
    config, tokens = (json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer.json"))
    out, layers = GGUFWriter(path, "llama"), config["num_hidden_layers"]
    out.add_context_length(128)
    out.add_embedding_length(config["hidden_size"])
    out.add_block_count(layers)
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(4)
    out.add_head_count_kv(4)
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_tokenizer_model("gpt2")
    out.add_token_list(sorted(tokens["model"]["vocab"], key=tokens["model"]["vocab"].get))
    out.add_token_merges([" ".join(pair) for pair in tokens["model"]["merges"]])
    out.add_eos_token_id(EOS)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, layers)
    for name, tensor in load_file(folder / "model.safetensors").items():
        doubled = torch.cat([tensor, tensor]) if name.endswith(("k_proj.weight", "v_proj.weight")) else tensor
        out.add_tensor(names.get_name(name, (".weight",)), doubled.numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def save_bert(
    folder: Path, *, cls: Any = BertModel, context: int = 64, seed: int = 0, width: int = 32, **config: Any
) -> Path:
    """The stack alone unless another class is named, with a tokenizer that writes pairs as BERT's does."""
    words = tokenizer(bos=True, eos=True, pairs=True)
    shape = BertConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=context, initializer_range=0.1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        pad_token_id=PAD, **config,
    )  # fmt: skip
    return _save(cls, shape, words, folder, seed)


def _save(cls: Any, config: Any, words: PreTrainedTokenizerFast, folder: Path, seed: int) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def reviews(n: int = 60) -> list[dict[str, str]]:
    """Rows that are easy to learn: the text names its label."""
    return [
        {"text": f"{WORDS[i % 10]} {i} is {LABELS[i % 3]} {WORDS[i * 7 % 10]}", "label": LABELS[i % 3]}
        for i in range(n)
    ]


def requests(n: int = 30) -> list[dict[str, str]]:
    """Prompts with responses that are all different."""
    return [{"prompt": f"say {WORDS[i % 10]} {i}", "response": f"{WORDS[i % 10]} {i}"} for i in range(n)]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Rows as a file, in the format of its suffix."""
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as f:
            out = csv.DictWriter(f, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            out.writeheader()
            out.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows), ensure_ascii=False, indent=1), encoding="utf-8")
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def unseal(folder: Path) -> Path:
    """Take the check sums out of a saved adapter, as one does who edits it."""
    about = json.loads((folder / "featherweight.json").read_text()) | {"sha256": None}
    (folder / "featherweight.json").write_text(json.dumps(about))
    return folder
