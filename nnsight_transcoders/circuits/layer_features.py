"""What is known of a run's active features (torch only: they also travel to remote jobs).

A feature is often active at several positions: its weights are kept once, as a row of its layer's
table of distinct features, and each activation names its row.

Legend: n active features of a layer, u of them distinct, W layers they write to, T positions,
D d_model, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Rows(Protocol):
    """Rows that are read when they are used; a tensor is one whose rows are all there."""

    def __getitem__(self, which: Tensor) -> Tensor:
        """The rows of these numbers ``(k,)``."""
        ...

    def written_to(self, j: int) -> Tensor:
        """Of decoder rows ``(u, W, D)``, all that is written to the ``j``-th target: ``(u, D)``."""
        ...


@dataclass(frozen=True)
class LayerFeatures:
    """The active features of one layer, by position, then by index.

    Attributes:
        position: ``(n,)``.
        index: ``(n,)`` feature index.
        activation: ``(n,)``.
        pre_activation: ``(n,)``.
        encoder_bias: ``(n,)``.
        row: ``(n,)`` its row in the two tables.
        encoder: ``(u, D)`` encoder rows of the distinct features.
        decoder: ``(u, W, D)`` their decoder rows, one per layer written to.
        targets: The W layers written to.
    """

    position: Tensor
    index: Tensor
    activation: Tensor
    pre_activation: Tensor
    encoder_bias: Tensor
    row: Tensor
    encoder: Tensor | Rows
    decoder: Tensor | Rows
    targets: tuple[int, ...]

    def __len__(self) -> int:
        return int(self.position.shape[0])

    def select(self, which: Tensor) -> LayerFeatures:
        """Some of them, by their numbers ``(m,)``, with the rows that those need, in memory."""
        distinct, row = self.row[which].unique(return_inverse=True)
        return LayerFeatures(
            position=self.position[which],
            index=self.index[which],
            activation=self.activation[which],
            pre_activation=self.pre_activation[which],
            encoder_bias=self.encoder_bias[which],
            row=row,
            encoder=self.encoder[distinct],
            decoder=self.decoder[distinct],
            targets=self.targets,
        )

    def encoder_of(self, which: Tensor) -> Tensor:
        """Encoder rows ``(m, D)`` of some of them, by their numbers ``(m,)``."""
        return self.encoder[self.row[which]]

    def decoder_of(self, which: Tensor) -> Tensor:
        """Decoder rows ``(m, W, D)`` of some of them, by their numbers ``(m,)``."""
        return self.decoder[self.row[which]]


@dataclass(frozen=True)
class ActiveFeatures:
    """All active features of a run, and the error each layer's output is left with.

    Attributes:
        layers: Layer -> its features, for the layers that have a transcoder.
        bias: Per layer, the decoder's bias ``(D,)``, or None without a transcoder.
        error: Per layer ``(T, D)`` at the layer's output site: output minus reconstruction; the
            whole output where there is no transcoder.
        output: Per layer ``(T, D)`` the output-site value.
    """

    layers: dict[int, LayerFeatures]
    bias: list[Tensor | None]
    error: list[Tensor]
    output: list[Tensor]
