"""The real model under interventions: one traced batch, a row for each (torch only: this code also
runs on a server).

The first row has no intervention: the others are compared with it, held layers keep its values, and
frozen parts stay at its attention patterns and normalisation denominators. So one forward pass is
all that it takes, and of the transcoders it needs the encoder rows of the features that are read or
set and the decoder rows of those that are set.

No weights of the model are looked at, which a sandboxed job does not have: values are mixed by the
frozen pattern and go through the model's own output projection, and what a norm computes is found
by calling it (``norm_probe.py``). Row 0 must then get the attention's own output, which the client
checks.

Legend: B rows, T positions, D d_model, G targets, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.norms import NormSpec
from nnsight_transcoders.remote.norm_probe import probe_norm

from .attention_weights import other_layouts, split_value
from .feature_changes import set_features
from .linear import FrozenNorm, mix_values


def run_interventions(model: Any, problem: dict[str, Any]) -> dict[str, Any]:
    """Run a batch of interventions on one prompt; inside a trace of its ``(B, T)`` token ids.

    Args:
        model: The model.
        problem: From ``intervention_run.InterventionRun``.

    Returns:
        ``activations``: layer -> ``(B, k)`` of the features that are read; ``kept``: layer ->
        ``(B, p, D)`` what its transcoder reads at the p positions asked for; how far (relatively)
        norms and attentions are from what they were taken for: ``norms`` and ``attention``. Unless
        it is to end with a layer (``until``) also ``targets (B, G)`` and, if asked for, the
        ``logits (B, V)`` and, where the model soft-caps them, those that it gives: ``capped``.
    """
    embedding = model.get(problem["embed"]).output
    # A server may run blocks in half precision.
    with torch.no_grad(), torch.autocast(embedding.device.type, enabled=False):
        return _PatchedRun(model, problem, embedding).result()


class _PatchedRun:
    """The batch as it runs: what is read, and what is still to be added to later layers.

    Args:
        model: The model.
        problem: See ``run_interventions``.
        embedding: The token embedding's output ``(B, T, ...)``.
    """

    def __init__(self, model: Any, problem: dict[str, Any], embedding: Tensor) -> None:
        self.model, self.problem = model, problem
        self.dtype = getattr(torch, problem["dtype"])
        self.shape = (*embedding.shape[:2], problem["d_model"])
        probed = [probe_norm(model, norm, embedding) for norm in problem["norms"]]
        self.norm_differences = [one.pop("difference") for one in probed]
        paths = [norm["path"] for norm in problem["norms"]]
        self.norms = {path: NormSpec(**one) for path, one in zip(paths, probed, strict=True)}
        self.attention_differences: list[float | None] = []
        self.kept: dict[int, Tensor] = {}
        #: Layer -> what is to be added at its output site ``(B, T, D)``.
        self.deltas: dict[int, Tensor] = {}
        # Where positions are embedded apart, a token's share of the stream is its embedding.
        apart = problem["position_embed"] is not None
        self.token = embedding[0].to(self.dtype, copy=True) if apart else None

    def result(self) -> dict[str, Any]:
        """Go through the model as it runs."""
        activations = {}
        for number, layer in enumerate(self.problem["layers"]):
            found = self.step(number, layer)
            if found is not None:
                activations[number] = found.cpu()
            if number == self.problem["until"]:
                return self.answer(activations)
        if self.problem["freeze"]:
            node = self.model.get(self.problem["final_norm"])
            x = node.input
            node.output = self.frozen(self.problem["final_norm"], x).to(x.dtype)
        return {**self.answer(activations), **_outputs(self.model, self.problem)}

    def answer(self, activations: dict[int, Tensor]) -> dict[str, Any]:
        """What was read on the way."""
        return {
            "activations": activations,
            "kept": self.kept,
            "attention": self.attention_differences,
            "norms": self.norm_differences,
        }

    # -- one block -------------------------------------------------------------------------------

    def step(self, number: int, layer: dict[str, Any]) -> Tensor | None:
        """Freeze what is frozen, set features, change the MLP's output.

        Returns:
            The activations that are asked for ``(B, n)``.
        """
        block = self.model.get(layer["block"])
        resid = block.input
        if number == 0 and self.problem["tokens"] is not None:
            resid = self.change_tokens(resid)
            block.input = resid
        if self.problem["freeze"]:
            self.freeze_attention(layer, resid)
        if self.problem["parallel"]:
            mid = resid
        else:
            path = layer["mlp_norm"] or layer["mlp_in"]
            mid = self.model.get(path).input.reshape(self.shape)
        mlp_in = self.mlp_input(layer, mid)
        found = None
        if layer["transcoder"] is not None:
            x = self.site(layer, mid, mlp_in)
            found, deltas = set_features(number, layer["transcoder"], x)
            for target, delta in deltas.items():
                self.add(target, delta)
        if layer["kept"] is not None:
            x = self.site(layer, mid, mlp_in)
            self.kept[number] = x[:, layer["kept"].to(x.device)].cpu()
        if number == self.problem["until"]:
            return found
        if layer["vectors"] is not None:
            self.add(number, self.vectors(layer["vectors"], resid))
        self.change_output(layer, self.deltas.pop(number, None))
        return found

    def change_tokens(self, resid: Tensor) -> Tensor:
        """Multiply what some tokens write to the stream."""
        at = {k: v.to(resid.device) for k, v in self.problem["tokens"].items()}
        own = (resid[0] if self.token is None else self.token).to(resid.device, self.dtype)
        changed = resid.to(self.dtype, copy=True)
        at_token = (at["row"], at["position"])
        changed[at_token] += (at["factor"] - 1).to(changed)[:, None] * own[at["position"]]
        return changed.to(resid.dtype)

    def freeze_attention(self, layer: dict[str, Any], resid: Tensor) -> None:
        """Attention at the first row's pattern, the norms around it at its denominators."""
        model = self.model
        if layer["attention_norm"] is not None:
            normed = self.frozen(layer["attention_norm"], resid)
            model.get(layer["attention_norm"]).output = normed.to(resid.dtype)
        value = model.get(layer["value"]).output.reshape(*self.shape[:2], -1)
        attended = model.get(layer["out_proj"]).output.clone()
        node = model.get(layer["attention"])
        output: Any = node.output
        if not isinstance(output, tuple) or len(output) < 2 or output[1] is None:
            self.attention_differences.append(None)
            return
        frozen = self.attend(layer, output[1][0], value, attended)
        # Some attentions add more to what their output projection gives (Bloom's residual).
        whole = output[0]
        out = frozen if torch.equal(whole, attended) else whole + (frozen - attended)
        node.output = (out, *output[1:])
        if layer["attention_post_norm"] is not None:
            normed = self.frozen(layer["attention_post_norm"], frozen)
            model.get(layer["attention_post_norm"]).output = normed.to(resid.dtype)

    def attend(
        self, layer: dict[str, Any], pattern: Tensor, value: Tensor, attended: Tensor
    ) -> Tensor:
        """What the attention gives at one pattern, shaped as ``attended``: by the layout of its
        values that explains the first row best."""
        n_heads, head_dim = self.problem["heads"]
        project = self.model.get(layer["out_proj"])
        best: tuple[float, Tensor] | None = None
        for layout in other_layouts(layer["value_layout"]):
            rows, _ = split_value((value.flatten(0, 1).T, None), n_heads, head_dim, layout)
            v = rows.T.reshape(*self.shape[:2], -1).to(self.dtype)
            mixed = mix_values(pattern.to(self.dtype), v, head_dim)
            found = project(mixed.to(attended.dtype)).reshape(attended.shape)
            expected = attended[:1].to(self.dtype)
            difference = (found[:1].to(self.dtype) - expected).norm()
            relative = float(difference / expected.norm().clamp_min(1e-30))
            if best is None or relative < best[0]:
                best = relative, found
        assert best is not None
        self.attention_differences.append(best[0])
        return best[1]

    def mlp_input(self, layer: dict[str, Any], mid: Tensor) -> Tensor:
        """What the MLP reads, its norm frozen."""
        node = self.model.get(layer["mlp_in"])
        if not self.problem["freeze"] or layer["mlp_norm"] is None:
            return node.input.reshape(self.shape)
        mlp_in = self.frozen(layer["mlp_norm"], mid)
        node.input = mlp_in.to(mid.dtype).reshape(node.input.shape)
        return mlp_in

    def site(self, layer: dict[str, Any], mid: Tensor, mlp_in: Tensor) -> Tensor:
        """What the transcoder reads."""
        name = layer["input_site"]
        if name != "N0":
            return (mlp_in if name == "N1" else mid).to(self.dtype)
        spec, x = self.norms[layer["mlp_norm"]], mid.to(self.dtype)
        if not self.problem["freeze"]:
            return spec.normalise(x)
        plain = torch.ones_like(spec.gain).to(x)
        return FrozenNorm(plain, None, spec.scale(x[0]), spec.centred).forward(x)

    def change_output(self, layer: dict[str, Any], delta: Tensor | None) -> None:
        """Hold the layer's output at the first row's, and add what changed."""
        before_norm = layer["output_site"] == "O"
        node = self.model.get(layer["mlp_out"])
        output = node.output
        y, *others = output if isinstance(output, tuple) else (output,)
        out = y.reshape(self.shape)
        if layer["mlp_post_norm"] is None or before_norm:
            out = self.changed(out, layer["held"], delta)
            changed = out.to(y.dtype).reshape(y.shape)
            node.output = (changed, *others) if others else changed
        if layer["mlp_post_norm"] is None:
            return  # sites O and O' are one
        node = self.model.get(layer["mlp_post_norm"])
        if self.problem["freeze"]:
            written = self.frozen(layer["mlp_post_norm"], out)
        else:
            written = node.output.reshape(self.shape)
        if not before_norm:
            written = self.changed(written, layer["held"], delta)
        node.output = written.to(y.dtype).reshape(y.shape)

    def changed(self, y: Tensor, held: bool, delta: Tensor | None) -> Tensor:
        """An output ``(B, T, D)`` with what was changed."""
        y = y.to(self.dtype)
        if held:
            y = y[:1].expand_as(y)
        return y.clone() if delta is None else y + delta.to(y.device)

    def frozen(self, path: str, x: Tensor) -> Tensor:
        """A norm of ``x (B, T, D)`` at the denominators of the first row."""
        spec, x = self.norms[path], x.to(self.dtype)
        bias = None if spec.bias is None else spec.bias.to(x)
        return FrozenNorm(spec.gain.to(x), bias, spec.scale(x[0]), spec.centred).forward(x)

    def add(self, layer: int, delta: Tensor) -> None:
        """Add to what is to be added at a layer's output site."""
        before = self.deltas.get(layer)
        self.deltas[layer] = delta if before is None else before.to(delta.device) + delta

    def vectors(self, entries: dict[str, Tensor], like: Tensor) -> Tensor:
        """Vectors ``(n, D)`` at single rows and positions, as ``(B, T, D)``."""
        delta = torch.zeros(self.shape, dtype=self.dtype, device=like.device)
        at = (entries["row"].to(like.device), entries["position"].to(like.device))
        return delta.index_put_(at, entries["vector"].to(delta), accumulate=True)


def _outputs(model: Any, problem: dict[str, Any]) -> dict[str, Any]:
    """What the unembedding gives at the targets' position."""
    at, asked = problem["position"], problem["targets"]
    unembed = model.get(problem["unembed"])
    final = unembed.input[:, at]
    # By a call of its own: what the model makes has every position's logits.
    logits = unembed(final[:, None])[:, 0]
    tokens, wide = asked["tokens"].to(logits.device), logits.double()
    targets = wide[:, tokens.clamp_min(0)] - wide.mean(-1, keepdim=True)
    if asked["directions"] is not None:
        along = final.double() @ asked["directions"].to(final.device).double().T
        targets = torch.where(tokens >= 0, targets, along.to(targets.device))
    found = {"targets": targets.cpu(), "logits": None, "capped": None}
    if not problem["whole_logits"]:
        return found
    capped, kept = model.output.logits[:, at], problem["logits_dtype"]
    dtype = logits.dtype if kept is None else getattr(torch, kept)
    found["logits"] = logits.to(dtype).cpu()
    # Of two products of the same the roundings may differ; more than that is a soft cap.
    rounding = max(2 * torch.finfo(logits.dtype).eps, 1e-5) * wide.abs().max()
    if bool((capped.to(wide) - wide).abs().max() > rounding):
        found["capped"] = capped.to(dtype).cpu()
    return found
