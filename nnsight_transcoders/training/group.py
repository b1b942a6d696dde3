"""What is trained together: one layer's transcoder, or all parts of a cross-layer one (torch only).

The forward pass gives the loss and what the log needs; nothing in it is changed, so that the same
module runs under data parallelism. Counters of dead features and running thresholds are updated
between steps (``observe``), from values that the processes have agreed on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnsight_transcoders.transcoder import CrossLayerPart, Transcoder

from . import objectives
from .config import TrainConfig
from .init import Part, Units
from .sparse import Active, choose_batch_topk, choose_topk, sparse_encode, sparse_sum

#: How fast BatchTopK's stored threshold follows the batches'.
THRESHOLD_RATE = 0.01


@dataclass(frozen=True)
class LayerStats:
    """One layer's step.

    Attributes:
        fvu: Share of the batch's variance unexplained; None where it is not known.
        l0: Active features per position.
        fired: ``(F,)`` which features were active at all.
        least: The smallest activation that BatchTopK kept, else None.
    """

    fvu: Tensor | None
    l0: Tensor
    fired: Tensor
    least: Tensor | None


class Group(nn.Module):
    """Transcoders with one loss.

    Args:
        parts: Layer -> its transcoder, in training units.
        config: The run's.
        units: Factors from the model's units.
    """

    def __init__(self, parts: Mapping[int, Part], config: TrainConfig, units: Units) -> None:
        super().__init__()
        self.config, self.units = config, units
        self.layers = tuple(sorted(parts))
        self.parts = nn.ModuleDict({str(layer): parts[layer] for layer in self.layers})
        for layer, part in parts.items():
            counter = torch.zeros(part.config.d_transcoder, dtype=torch.long)
            self.register_buffer(f"idle_{layer}", counter.to(part.W_enc.device))
            if config.activation == "batchtopk":  # it follows the batches, not a gradient
                self.threshold(layer).requires_grad_(False)

    def part(self, layer: int) -> Part:
        """A layer's transcoder."""
        part = self.parts[str(layer)]
        assert isinstance(part, Transcoder | CrossLayerPart)
        return part

    def threshold(self, layer: int) -> Tensor:
        """The thresholds of JumpReLU or BatchTopK."""
        return self.part(layer).get_parameter("activation.threshold")

    def idle(self, layer: int) -> Tensor:
        """``(F,)`` positions since each feature last fired."""
        return self.get_buffer(f"idle_{layer}")

    def forward(
        self, batch: Mapping[int, tuple[Tensor, Tensor]], sparsity: float
    ) -> tuple[Tensor, dict[int, LayerStats]]:
        """The loss on a batch, and what happened.

        Args:
            batch: Layer -> input and output values ``(B, d)`` in the model's units.
            sparsity: The penalty's factor at this step.
        """
        inputs, targets = self._in_units(batch)
        active: dict[int, Active | Tensor] = {}
        loss = next(iter(targets.values())).new_zeros(())
        for layer in self.layers:
            active[layer], penalty = self._encode(self.part(layer), inputs[layer])
            if penalty is not None:
                loss = loss + sparsity * penalty.to(loss.device)
        written = self._written(active)
        errors = {}
        for layer in self.layers:
            part = self.part(layer)
            made = written[layer] + part.b_dec + part.skip(inputs[layer])
            errors[layer] = targets[layer] - made
            objective = self._objective(errors[layer], targets[layer])
            loss = loss + objective.to(loss.device)
        if self.config.aux_weight:
            loss = loss + self.config.aux_weight * self._auxiliary(inputs, errors).to(loss.device)
        with torch.no_grad():
            stats = {n: self._stats(errors[n], targets[n], active[n]) for n in self.layers}
        return loss, stats

    def _in_units(
        self, batch: Mapping[int, tuple[Tensor, Tensor]]
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        inputs, targets = {}, {}
        for layer in self.layers:
            x, y = batch[layer]
            like = self.part(layer).W_enc
            inputs[layer] = x.to(like) * self.units.inputs[layer]
            targets[layer] = y.to(like) * self.units.outputs[layer]
        return inputs, targets

    def _objective(self, error: Tensor, target: Tensor) -> Tensor:
        if self.config.objective == "mse":
            return objectives.mse_loss(error)
        return objectives.fvu_loss(error, target)

    # -- features --------------------------------------------------------------------------------

    def _encode(self, part: Part, x: Tensor) -> tuple[Active | Tensor, Tensor | None]:
        """Activations and, where one is asked for, their penalty."""
        c = self.config
        if c.activation in ("topk", "grouptopk"):
            choose = choose_topk(c.k, c.n_groups or 1 if c.activation == "grouptopk" else 1)
            found = sparse_encode(x, part.W_enc, part.b_enc, choose)
        elif c.activation == "batchtopk":
            found = sparse_encode(x, part.W_enc, part.b_enc, choose_batch_topk(c.k))
        else:
            pre = F.linear(x, part.W_enc, part.b_enc).to(x.dtype)
            if c.activation == "relu":
                return (acts := pre.relu()), self._penalty(part, acts, len(x))
            threshold = self.threshold(part.config.layer)
            found = objectives.jumprelu(pre, threshold, c.bandwidth)
            if c.penalty == "l0":
                return found, objectives.l0_penalty(pre, threshold, c.bandwidth)
        return found, self._penalty(part, found, len(x))

    def _penalty(self, part: Part, active: Active | Tensor, n: int) -> Tensor | None:
        c = self.config
        if c.penalty is None:
            return None
        weights = torch.ones_like(part.b_enc)
        if c.decoder_norm == "weighted":
            weights = part.W_dec.flatten(1).norm(dim=1)
        values = active
        if isinstance(active, Active):
            values, weights = active.values, weights[active.columns]
        assert isinstance(values, Tensor)
        if c.penalty == "tanh":
            return objectives.tanh_penalty(values, weights, c.tanh_scale, n)
        return objectives.l1_penalty(values, weights, n)

    def _written(self, active: Mapping[int, Active | Tensor]) -> dict[int, Tensor]:
        """What all features write to each layer."""
        total: dict[int, Tensor] = {}
        for layer in self.layers:
            part, found = self.part(layer), active[layer]
            table = part.W_dec.flatten(1)
            out = sparse_sum(found, table) if isinstance(found, Active) else found @ table
            _add(total, part, out)
        return total

    def _auxiliary(self, inputs: Mapping[int, Tensor], errors: Mapping[int, Tensor]) -> Tensor:
        """The loss of the dead features on what is left of each layer's output."""
        revived: dict[int, Tensor] = {}
        for layer in self.layers:
            part = self.part(layer)
            dead = (self.idle(layer) >= self.config.dead_after).nonzero().flatten()
            if len(dead):
                k = self.config.aux_k or max(1, part.config.d_out // 2)
                pre = F.linear(inputs[layer], part.W_enc[dead], part.b_enc[dead])
                out = objectives.largest(pre, k) @ part.W_dec.flatten(1)[dead]
                _add(revived, part, out)
        losses = [objectives.auxiliary_loss(errors[n], revived[n]) for n in revived]
        return sum(losses, start=errors[self.layers[0]].new_zeros(()))

    # -- between steps ---------------------------------------------------------------------------

    def _stats(self, error: Tensor, target: Tensor, active: Active | Tensor) -> LayerStats:
        width, least = 0, None
        if isinstance(active, Active):
            width, on = active.width, active.values > 0
            fired = torch.zeros(width, dtype=torch.bool, device=on.device)
            fired[active.columns[on]] = True
            if self.config.activation == "batchtopk" and len(active.values):
                least = active.values.min()
        else:
            on = active > 0
            fired = on.any(0)
        l0 = on.sum() / len(target)
        return LayerStats(objectives.fvu_loss(error, target), l0, fired, least)

    @torch.no_grad()
    def observe(self, layer: int, fired: Tensor, least: Tensor | None, n_positions: int) -> None:
        """Count which features fired in a step of so many positions; follow the threshold."""
        idle = self.idle(layer)
        idle.add_(n_positions)
        idle[fired] = 0
        if least is not None:
            threshold = self.threshold(layer)
            rate = THRESHOLD_RATE if bool(threshold > 0) else 1.0
            threshold.lerp_(least.to(threshold.dtype), rate)

    @torch.no_grad()
    def constrain(self) -> None:
        """What has to hold after a step: decoder rows of norm 1, thresholds not below zero."""
        for layer in self.layers:
            part = self.part(layer)
            if self.config.decoder_norm == "unit":
                norms = part.W_dec.flatten(1).norm(dim=1).clamp_min(1e-12)
                part.W_dec.div_(norms.view(-1, *[1] * (part.W_dec.dim() - 1)))
            if self.config.activation == "jumprelu":
                self.threshold(layer).clamp_min_(0)

    @torch.no_grad()
    def project(self) -> None:
        """Take from the decoder's gradient what would only change the rows' norms."""
        if self.config.decoder_norm != "unit":
            return
        for layer in self.layers:
            table = self.part(layer).W_dec
            if table.grad is None:
                continue
            rows, grad = table.flatten(1), table.grad.flatten(1)
            along = (rows * grad).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True)
            table.grad.sub_((along * rows).view_as(table))


def _add(total: dict[int, Tensor], part: Part, out: Tensor) -> None:
    """Add what a part writes ``(B, targets * d)`` to the layers that it writes to."""
    targets = part.targets if isinstance(part, CrossLayerPart) else (part.config.layer,)
    for target, value in zip(targets, out.chunk(len(targets), dim=-1), strict=True):
        total[target] = total[target] + value if target in total else value
