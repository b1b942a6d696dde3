"""Models and transcoder sets that really reconstruct, for the tests of ``verify``."""

from __future__ import annotations

from typing import Any

import nnsight
import torch
import transformers
import zoo

from nnsight_transcoders import (
    Transcoder,
    TranscoderConfig,
    TranscoderSet,
    resolve_sites,
    verify,
)
from nnsight_transcoders.circuits.collect import collect
from nnsight_transcoders.evaluation.readings import SiteValues
from nnsight_transcoders.norms import probed_spec
from nnsight_transcoders.transcoder import CrossLayerPart

D, LAYERS = zoo.D_MODEL, zoo.N_LAYERS
TEXT = [
    torch.randint(3, zoo.VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (10, 12, 14, 14, 12, 16)
]


def built(config: Any) -> Any:
    """An nnsight model of a config, with gains and biases of the MLP's norm that matter."""
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter += 0.2 * torch.randn_like(parameter)
            if name.endswith(("ln_2.weight", "pre_feedforward_layernorm.weight")):
                parameter.copy_(torch.randn(D).exp() * torch.randn(D).sign())
            if name.endswith("ln_2.bias"):
                parameter.copy_(0.5 * torch.randn(D))
            if name.endswith("mlp.c_proj.bias"):
                parameter.copy_(6 * torch.randn(D))
    return nnsight.TransformersModel(module, task="text-generation", tokenizer=zoo.tokenizer())


def relu_model() -> Any:
    """A GPT-2 whose MLPs are ReLU and as wide as the model: exact transcoders, square matrices."""
    options = {**zoo._GPT2, "n_inner": D, "activation_function": "relu"}
    return built(transformers.GPT2Config(**options))


def exact(model: Any, *, skip: bool = False, **changes: Any) -> TranscoderSet:
    """The MLPs of a ReLU GPT-2 as transcoders.

    With ``skip``, half the features' work is undone by a second half and a linear path:
    ``a = relu(z)`` is ``(z + |z|) / 2``, of which the linear part goes through ``W_skip``.
    """
    modules = {}
    for layer, block in enumerate(model._module.transformer.h):
        first, last = block.mlp.c_fc, block.mlp.c_proj
        width = 2 * D if skip else D
        config = TranscoderConfig(D, D, width, layer=layer, skip=skip, **changes)
        module = Transcoder(config)
        encoder, decoder = first.weight.T, last.weight
        with torch.no_grad():
            module.b_dec.copy_(last.bias)
            if skip:
                module.W_enc.copy_(torch.cat([encoder, -encoder]))
                module.b_enc.copy_(torch.cat([first.bias, -first.bias]))
                module.W_dec.copy_(torch.cat([decoder, decoder]) / 2)
                module.W_skip.copy_((encoder.T @ decoder).T / 2)
                module.b_dec.add_(first.bias @ decoder / 2)
            else:
                module.W_enc.copy_(encoder)
                module.b_enc.copy_(first.bias)
                module.W_dec.copy_(decoder)
        modules[layer] = module
    return TranscoderSet.from_transcoders(modules)


def norm(model: Any, layer: int) -> Any:
    return model._module.transformer.h[layer].ln_2.requires_grad_(False)


def random_module() -> Transcoder:
    """A transcoder with random weights."""
    module = Transcoder(TranscoderConfig(D, D, 64))
    for weight in module.parameters():
        torch.nn.init.normal_(weight)
    return module


def site_values(x: torch.Tensor, y: torch.Tensor, first: torch.Tensor | None = None) -> SiteValues:
    """A layer that has one input and one output site."""
    first = torch.zeros(len(x), dtype=torch.bool) if first is None else first
    return SiteValues({"N1": x}, {"O": y.detach()}, None, first)


def as_if(module: Any, **changes: Any) -> Transcoder:
    """The same weights under another config."""
    other = Transcoder(module.config.replace(**changes))
    other.load_state_dict(module.state_dict())
    return other


def least_squares(model: Any, reads: str, writes: str) -> TranscoderSet:
    """Random encoders, and decoders that fit ``TEXT`` exactly: more features than positions."""
    runs = [collect(model, resolve_sites(model), torch.tensor(text)) for text in TEXT]
    modules = {}
    for layer in range(LAYERS):
        here = {
            site: torch.cat([getattr(run, name)[layer] for run in runs])
            for site, name in (("R", "mid"), ("N1", "mlp_in"), ("O", "mlp_out"), ("O'", "mlp_post"))
        }
        spec = probed_spec(model._module, resolve_sites(model).layers[layer].mlp_norm, D)
        here["N0"] = spec.normalise(here["R"])
        config = TranscoderConfig(
            D, D, 512, layer=layer, input_site=reads, output_site=writes, dtype="float64"
        )
        module, x = Transcoder(config), here[reads].double()
        with torch.no_grad():
            module.W_enc.normal_().div_(x.norm(dim=1).mean())
            module.b_enc.normal_().mul_(0.3)
            acts = module.encode(x)
            module.W_dec.copy_(torch.linalg.pinv(acts, rtol=1e-9) @ here[writes].double())
        modules[layer] = module
    return TranscoderSet.from_transcoders(modules)


def changed(transcoders: TranscoderSet, change: Any) -> TranscoderSet:
    """The set after ``change(module, layer)`` of every layer."""
    with torch.no_grad():
        for layer in transcoders.layers:
            change(transcoders[layer], layer)
    return transcoders


def causes(model: Any, transcoders: TranscoderSet) -> set[str]:
    """The hypotheses of a set of which no layer fits, without the FVU they reach."""
    report = verify(model, transcoders, TEXT)
    assert not report.ok
    assert [fit.verdict for fit in report.layers] == ["does not fit"] * LAYERS, report
    assert report.to_dict()["layers"][0]["hypothesis"] == report.layers[0].hypothesis
    return {str(fit.hypothesis).split(" (FVU")[0] for fit in report.layers}


def cross_layer(model: Any, **changes: Any) -> TranscoderSet:
    """The exact set as a cross-layer one: features in pairs, whose writes to later layers cancel.

    Each layer but the first takes half of its output's bias from a constant feature of layer 0.
    """
    modules, plain = {}, exact(model)
    for layer in plain.layers:
        own = plain[layer]
        config = TranscoderConfig(D, D, 2 * D + 1, layer=layer, **changes)
        part = CrossLayerPart(config, tuple(range(layer, LAYERS)))
        with torch.no_grad():
            part.W_enc[: 2 * D].copy_(own.W_enc.repeat(2, 1))
            part.b_enc.copy_(torch.cat([own.b_enc, own.b_enc, torch.ones(1)]))
            part.W_dec[: 2 * D, 0].copy_(own.W_dec.repeat(2, 1) / 2)
            noise = torch.randn(D, LAYERS - layer - 1, D)
            part.W_dec[: 2 * D, 1:].copy_(torch.cat([noise, -noise]))
            part.b_dec.copy_(own.b_dec / (2 if layer else 1))
            if not layer:
                for later in plain.layers[1:]:
                    part.W_dec[-1, later] = plain[later].b_dec.detach() / 2
        modules[layer] = part
    return TranscoderSet.from_transcoders(modules)
