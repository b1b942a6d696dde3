"""Models and transcoder sets on disk, in files that both tools read.

Random weights, except for a SmolLM2-135M that is given as a folder. Encoder biases are set on one
run of the model, so that each layer has a chosen number of active features per token (L0): with
random encoders and no bias, half of all features would be active. The sets are written in
circuit-tracer's layout, tensor by tensor, with no code of either package.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: Its name.
        config: Makes the model's config; None: the SmolLM2 folder that was given.
        backends: circuit-tracer's backends that know the architecture.
        d_transcoder: Features per layer.
        n_positions: T.
        l0: Active features per token and layer, on average.
        kind: ``relu``, ``jumprelu``, ``skip`` or ``clt``.
        batch_sizes: circuit-tracer's ``batch_size``: its default, and what may suit it better.
        max_feature_nodes: For both; None: all of them.
    """

    name: str
    config: Callable[[], Any] | None
    backends: tuple[str, ...]
    d_transcoder: int
    n_positions: int
    l0: float
    kind: str = "relu"
    batch_sizes: tuple[int, ...] = (512,)
    max_feature_nodes: int | None = None


def _gpt2() -> Any:
    return transformers.GPT2Config()


def _llama() -> Any:
    return transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=256,
        initializer_range=0.1,
    )


def _gemma2() -> Any:
    return transformers.Gemma2Config(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=128,
        max_position_embeddings=256,
        query_pre_attn_scalar=16,
        initializer_range=0.1,
        pad_token_id=1,  # its embedding is zero, and the prompt begins with token 0
    )


BOTH = ("transformerlens", "nnsight")
CASES = {
    case.name: case
    for case in (
        Case("tiny", _llama, BOTH, 512, 16, 5),
        Case("tiny-jumprelu", _llama, BOTH, 512, 16, 5, "jumprelu"),
        Case("tiny-skip", _llama, BOTH, 512, 16, 5, "skip"),
        Case("tiny-clt", _llama, BOTH, 512, 16, 5, "clt"),
        Case("tiny-gemma2", _gemma2, ("nnsight",), 512, 16, 5, "jumprelu"),
        Case("gpt2-small", _gpt2, BOTH[:1], 24576, 32, 5.4, batch_sizes=(512, 128, 32)),
        Case("smollm2", None, BOTH, 4608, 32, 2.15, batch_sizes=(512, 32)),
        Case(
            "gpt2-small-512",
            _gpt2,
            BOTH[:1],
            24576,
            512,
            5.4,
            batch_sizes=(8,),
            max_feature_nodes=256,
        ),
    )
}


def make(case: Case, folder: Path, smollm2: Path | None) -> Path:
    """Write ``model/``, ``set/`` and ``settings.json`` of a case; done once per folder."""
    done = folder / "settings.json"
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    if case.config is None:
        if smollm2 is None:
            raise SystemExit("smollm2 needs --smollm2 FOLDER with the model")
        shutil.copytree(smollm2, folder / "model", dirs_exist_ok=True)
        _for_older_transformers(folder / "model")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            smollm2, attn_implementation="eager", dtype=torch.float32
        ).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
        ids = tokenizer(_TEXT)["input_ids"]
        first = tokenizer.bos_token_id or tokenizer.eos_token_id
        ids = [first, *ids][: case.n_positions]
    else:
        model = _random_model(case, folder / "model")
        vocabulary = model.config.vocab_size
        ids = [0, *torch.randint(8, vocabulary, (case.n_positions - 1,)).tolist()]
    if len(ids) != case.n_positions:
        raise SystemExit(f"the text has {len(ids)} tokens, {case.name} wants {case.n_positions}")
    _write_set(case, model, torch.tensor(ids), folder / "set")
    settings = {key: value for key, value in asdict(case).items() if key != "config"}
    done.write_text(json.dumps({**settings, "token_ids": ids}))
    return folder


def _random_model(case: Case, folder: Path) -> Any:
    assert case.config is not None
    config = case.config()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.float().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:  # as initialised they would hide a forgotten gain
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif name.endswith("bias"):
            parameter.data = 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w0", unk_token="w1"
    ).save_pretrained(folder)
    _for_older_transformers(folder)
    return model


def _for_older_transformers(folder: Path) -> None:
    """Add what versions before 5, which circuit-tracer needs, call some fields."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw["torch_dtype"] = "float32"
    if "n_positions" in raw:
        raw["n_ctx"] = raw["n_positions"]
    rope = raw.get("rope_parameters") or {}
    if "rope_theta" in rope:
        raw["rope_theta"] = rope["rope_theta"]
    path.write_text(json.dumps(raw))
    path = folder / "tokenizer_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "tokenizer_class": "PreTrainedTokenizerFast"}))


def _mlp_values(model: Any, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Per layer, what the transcoder reads and what is added for the MLP to the stream, ``(T, D)``
    each: the MLP's own input, or with Gemma's sandwich norms the stream before the norm."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    handles = []
    for block in blocks:
        first: nn.Module = getattr(block, "pre_feedforward_layernorm", block.mlp)
        last: nn.Module = getattr(block, "post_feedforward_layernorm", block.mlp)
        handles.append(first.register_forward_pre_hook(lambda _, x: inputs.append(x[0][0])))
        handles.append(last.register_forward_hook(lambda _, __, y: outputs.append(y[0])))
    with torch.no_grad():
        model(ids[None])
    for handle in handles:
        handle.remove()
    return zip(inputs, outputs, strict=True)


def _write_set(case: Case, model: Any, ids: Tensor, folder: Path) -> None:
    """Layer by layer, so that only one is in memory."""
    folder.mkdir(exist_ok=True)
    values = list(_mlp_values(model, ids))
    for layer, (x, y) in enumerate(values):
        tensors = _layer(case, x, y, len(values) - layer)
        if case.kind == "clt":
            decoder = {f"W_dec_{layer}": tensors.pop("W_dec")}
            save_file(decoder, folder / f"W_dec_{layer}.safetensors")
            renamed = {f"{name}_{layer}": tensor for name, tensor in tensors.items()}
            save_file(renamed, folder / f"W_enc_{layer}.safetensors")
        else:
            save_file(tensors, folder / f"layer_{layer}.safetensors")
    kind = "cross_layer_transcoder" if case.kind == "clt" else "transcoder_set"
    sandwich = "gemma2" in case.name  # there circuit-tracer does not know the MLP's own input
    record = {
        "model_kind": kind,
        "feature_input_hook": "hook_resid_mid" if sandwich else "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(record))


def _layer(case: Case, x: Tensor, y: Tensor, n_above: int) -> dict[str, Tensor]:
    d_model, width = x.shape[1], case.d_transcoder
    size = float(x.norm(dim=-1).mean())
    W_enc = torch.randn(width, d_model) / size
    pre = x[1:] @ W_enc.T
    cut = _cut(case, pre)
    size_y = float(y.norm(dim=-1).mean())
    shape = (width, n_above, d_model) if case.kind == "clt" else (width, d_model)
    tensors = {
        "W_enc": W_enc,
        "b_enc": torch.full((width,), -cut),
        "W_dec": torch.randn(shape) * size_y * (case.l0 * d_model) ** -0.5,
        "b_dec": torch.randn(d_model) * 0.2 * size_y * d_model**-0.5,
    }
    if case.kind == "jumprelu":
        tensors["b_enc"] = torch.randn(width) * 0.1
        cut = _cut(case, pre + tensors["b_enc"])
        tensors["activation_function.threshold"] = torch.full((width,), cut)
    if case.kind == "skip":
        tensors["W_skip"] = torch.randn(d_model, d_model) * 0.5 * size_y / size * d_model**-0.5
    return tensors


def _cut(case: Case, pre: Tensor) -> float:
    """Above it lie L0 pre-activations per token; midway between two, so that rounding does not
    decide."""
    kept = max(1, round(case.l0 * len(pre)))
    return float(pre.flatten().topk(kept + 1).values[-2:].mean())


_TEXT = (
    "When Mary and John went to the store, John gave a drink to Mary. The war lasted from the year "
    "1732 to the year 1741, and the capital of France is Paris, where the treaty was signed."
)
