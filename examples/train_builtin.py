"""Trains everything in `nnsight_transcoders/builtin/files`: the language model and its transcoders.

The files are small enough to ship, so nobody has to run this; it is here so that every number in
`record.json` can be made again. The seed is 0 everywhere, and a command that is run again gives the
same weights (docs/builtin.md). Commands, in order (less than an hour on two free CPU cores):

    python examples/train_builtin.py model
    python examples/train_builtin.py transcoders --kind per-layer
    python examples/train_builtin.py transcoders --kind skip
    python examples/train_builtin.py transcoders --kind clt
    python examples/train_builtin.py report
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import typer
from nnsight import TransformersModel
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from nnsight_transcoders import TrainConfig, TranscoderSet, train
from nnsight_transcoders.builtin import text
from nnsight_transcoders.builtin.scores import LEADING, all_scores, set_scores

FILES = Path(text.__file__).parent / "files"
CONTEXT = 128
ROW_LENGTHS = (32, 64, CONTEXT)
"""Rows of one step share a length; short rows make more sentences start at position 0."""
KINDS: dict[str, dict[str, Any]] = {
    "per-layer": {"d_transcoder": 768, "activation": "batchtopk", "k": 16},
    "skip": {"d_transcoder": 768, "activation": "topk", "k": 16, "skip": True},
    "clt": {"d_transcoder": 512, "activation": "batchtopk", "k": 12, "cross_layer": True},
}
"""What the transcoder sets differ in; all read at N1 and write at O."""
STEPS = 1500
TEST_SEED = 10_000
"""The seed of the text that sets are measured on; no training run uses it."""
DEAD_AFTER = 100
"""Steps without firing after which a feature counts as dead."""
TOKENS = 2048
"""Positions per training step of a transcoder set."""

app = typer.Typer(add_completion=False, help=__doc__)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose tokens carry their leading space, as GPT-2's do."""
    vocabulary = {token: index for index, token in enumerate(text.vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=text.UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(text.PIECE), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{text.BOS} $A",
        pair=f"{text.BOS} $A {text.BOS} $B",
        special_tokens=[(text.BOS, vocabulary[text.BOS])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=text.BOS,
        eos_token=text.EOS,
        pad_token=text.PAD,
        unk_token=text.UNK,
        model_max_length=CONTEXT,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, layers: int = 4) -> LlamaForCausalLM:
    """A Llama of about 1.2 million parameters, freshly initialised."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.04,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches(
    tokenizer: PreTrainedTokenizerFast, tokens: int, seed: int
) -> Iterator[torch.LongTensor]:
    """Endless training batches of sentences packed into rows.

    Each sentence begins with `<bos>`; each row begins with a sentence and is cut at its end.

    Args:
        tokenizer: The builtin tokenizer.
        tokens: Tokens in a batch; the row length is drawn anew for every batch.
        seed: Seed of the text and of the row lengths.

    Yields:
        Token ids of shape (batch, pos).
    """
    source, rng = text.stream(seed), random.Random(seed)
    while True:
        length = rng.choice(ROW_LENGTHS)
        rows: list[list[int]] = [[]]
        while len(rows) <= tokens // length:
            for ids in tokenizer([next(source) for _ in range(64)])["input_ids"]:
                rows[-1].extend(ids)
                if len(rows[-1]) >= length:
                    rows[-1] = rows[-1][:length]
                    rows.append([])
        yield torch.tensor(rows[: tokens // length])


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warmup, then a cosine down to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def optimizer_for(model: torch.nn.Module, decay: float) -> torch.optim.AdamW:
    """AdamW that decays the matrices and leaves the norms' gains alone."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Saves float16 weights under a config that makes them load as float32."""
    model.half().save_pretrained(out)
    config = model.config
    config.dtype = torch.float32
    config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for file in out.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner may read
    model.float()


@app.command()
def model(
    out: Path = FILES / "model",
    steps: int = 4000,
    tokens: int = 4096,
    peak: float = 2e-3,
    decay: float = 0.1,
    layers: int = 4,
    seed: int = 0,
    threads: int = 1,
    every: int = 250,
) -> None:
    """Trains the language model and its tokenizer."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    network = make_model(tokenizer, layers)
    optimizer = optimizer_for(network, decay)
    source, start = batches(tokenizer, tokens, seed), time.time()
    for step in range(steps):
        ids = next(source)
        loss = network(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        optimizer.step()
        optimizer.zero_grad()
        if step % every == every - 1 or step == steps - 1:
            scores = all_scores(network, tokenizer, 200)
            shown = " ".join(f"{k}={v['accuracy']:.2f}/{v['mass']:.2f}" for k, v in scores.items())
            typer.echo(f"{step + 1} {time.time() - start:.0f}s loss={loss.item():.3f} {shown}")
    save_model(network, tokenizer, out)
    settings = {"steps": steps, "tokens_per_step": tokens, "peak_learning_rate": peak}
    size = network.num_parameters()
    note(("model",), {**settings, "weight_decay": decay, "seed": seed, "parameters": size})


def note(path: tuple[str, ...], values: Mapping[str, Any]) -> None:
    """Writes values into `record.json` under the given keys and leaves the rest as it is."""
    file = FILES / "record.json"
    record = json.loads(file.read_text()) if file.exists() else {}
    place = record
    for key in path:
        place = place.setdefault(key, {})
    place.update(values)
    file.write_text(json.dumps(record, indent=2) + "\n")


def rows(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[torch.Tensor]:
    """Endless rows of packed sentences, as the model was trained on."""
    for batch in batches(tokenizer, TOKENS, seed):
        yield from batch


@app.command()
def transcoders(
    kind: str = typer.Option(..., help=f"One of {', '.join(KINDS)}."),
    model: Path = FILES / "model",
    out: Path | None = None,
    steps: int = STEPS,
    peak: float = 2e-3,
    seed: int = 0,
    threads: int = 1,
) -> None:
    """Trains one set of transcoders on the model's own activations, with the package's trainer."""
    torch.set_num_threads(threads)
    network = TransformersModel(str(model), task="text-generation", dispatch=True)
    config = TrainConfig(
        **KINDS[kind],
        leading_positions=LEADING,
        special_tokens=True,  # each sentence's <bos> is replaced too, once the set is attached
        pack=False,
        context=CONTEXT,
        n_tokens=steps * TOKENS,
        batch_size=TOKENS,
        buffer_size=16 * TOKENS,
        lr=peak,
        warmup=100 / steps,
        dead_after=DEAD_AFTER * TOKENS,
        dtype="float16",
        seed=seed,
    )
    trained = train(network, rows(network.tokenizer, seed + 1), config)
    folder = trained.save_pretrained(out or FILES / kind)
    (folder / "README.md").unlink()  # a Hub model card; docs/builtin.md says it better


def settings(folder: Path) -> dict[str, Any]:
    """How a set was trained, by the `TrainConfig` that its own `config.json` keeps."""
    kept = json.loads((folder / "config.json").read_text())["provenance"]["config"]
    names = ("d_transcoder", "activation", "k", "skip", "cross_layer", "seed")
    return {
        **{name: kept[name] for name in names},
        "steps": kept["n_tokens"] // kept["batch_size"],
        "tokens_per_step": kept["batch_size"],
        "peak_learning_rate": kept["lr"],
    }


@app.command()
def report(model: Path = FILES / "model", sets: Path = FILES, threads: int = 1) -> None:
    """Measures the model and the sets that are there and writes the numbers to `record.json`."""
    torch.set_num_threads(threads)
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    note(("tasks",), all_scores(network, tokenizer))
    ids = next(batches(tokenizer, 65_536, seed=TEST_SEED))
    for kind in KINDS:
        if (sets / kind).exists():
            opened = TranscoderSet.from_pretrained(sets / kind, dtype=torch.float32)
            modules = {layer: opened[layer] for layer in opened.layers}
            scores = set_scores(network, tokenizer, modules, ids)
            note(("sets", kind), {**settings(sets / kind), **scores})
            typer.echo(f"{kind} {json.dumps(scores)}")


if __name__ == "__main__":
    app()
