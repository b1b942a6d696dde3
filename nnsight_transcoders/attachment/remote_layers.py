"""Attached transcoders in a remote job: what ``replaced.transcoders`` is on the server.

A module that was mounted on the client has no location in the server's model, and a block that runs
in a sandbox does not even share a process with the model. What is left are the model's own
locations. So the stored edit reads a layer's input site and keeps its features in plain Python
objects; the user's blocks run after it at the same location, read and change those objects, and the
edit decodes what is left in them when the model reaches the layer's output. A block reads and
writes ``transcoders[8].features.output`` as it does locally:

===================  =====================  ===============================================
                     where a block waits    what it gets
===================  =====================  ===============================================
``token_index``      the MLP's input        a tensor of its rows
``pre_activations``  the MLP's input        the same; changed in place or assigned
``features``         the MLP's input        the same
``reconstruction``   the MLP's input        the same; reading it fixes the features
``error``            the MLP's output       the same; has to be assigned
===================  =====================  ===============================================

A sparse autoencoder reads the MLP's output, so that a block gets all of its values there. The edit
has written its reconstruction by then, and writes again whenever a block changes something
(``watched.py``).

This module travels as text (``remote/shipping.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from nnsight.intervention.interleaver import OutOfOrderError
from nnsight.intervention.iterator import Iterations
from torch import Tensor

from nnsight_transcoders.errors import InputError
from nnsight_transcoders.norms import NormSpec
from nnsight_transcoders.site_reads import called_norm
from nnsight_transcoders.transcoder import CrossLayerPart, Transcoder, TranscoderConfig

from .feature_edits import invoke_rows
from .replacement import Replacement, difference
from .token_index import continued, token_index_of
from .watched import Watched

_NAMES = ("token_index", "pre_activations", "features", "reconstruction", "error")


def build(data: dict[str, Any]) -> RemoteTranscoders:
    """What ``MountedTranscoders`` has made of itself, brought to life."""
    parts: dict[int, Any] = {layer: _part(**part) for layer, part in data["parts"].items()}
    layers: dict[int, RemoteLayer] = {}
    for one in data["layers"]:
        below = [parts[layer] for layer in one["below"]]
        replacement = Replacement(parts[one["layer"]], below, one["mode"], one["numbers"])
        layers[one["layer"]] = RemoteLayer(replacement.requires_grad_(False), one)
    return RemoteTranscoders(data["path"], layers)


def _part(
    config: dict[str, Any], targets: tuple[int, ...] | None, state: dict[str, Tensor]
) -> Transcoder | CrossLayerPart:
    made, threshold = TranscoderConfig.from_dict(config), state.get("activation.threshold")
    with torch.device("meta"):
        part = (
            Transcoder(made, threshold)
            if targets is None
            else CrossLayerPart(made, targets, threshold)
        )
    part.load_state_dict(state, assign=True)
    return part


class RemoteTranscoders:
    """``replaced.transcoders`` on the server: indexed by layer.

    Args:
        path: Where it would be mounted.
        layers: Its layers.
    """

    def __init__(self, path: str, layers: dict[int, RemoteLayer]) -> None:
        self.path, self._layers = path, layers
        self.layers = tuple(layers)

    def __getitem__(self, layer: int) -> RemoteLayer:
        return self._layers[layer]

    def __iter__(self) -> Any:
        return iter(self._layers.values())

    def __len__(self) -> int:
        return len(self._layers)

    def _named_children(self) -> list[Any]:
        """nnsight walks the tree that this object hangs in: nothing of it has a location."""
        return []

    def run(self, edited: Any) -> None:
        """The body of the stored edit."""
        reached, runs = 0, edited.interleaver.counts
        finished = runs.get("result", 0)
        index = None
        for layer in self._layers.values():
            layer.open(edited)
        try:
            for step in Iterations()[:]:
                reached = step
                # Once only: later, the model's inputs hold its cache, and in a sandbox what is read
                # is copied to another process and back.
                if index is None:
                    index = token_index_of(*edited.inputs)
                    new = index
                else:
                    new = None
                state: dict[int, RemoteLayer] = {}
                for layer in self._layers.values():
                    x = layer.read()
                    if new is None:
                        index, new = continued(index, x)
                    layer.begin(x.reshape(*new.shape, -1), new, state)
                    layer.end()
        except OutOfOrderError:
            for layer in self._layers.values():
                layer.check()
            # See ``splices.run_splices``. The counts are empty where another process drives the
            # model; there a run that is stopped on purpose ends this block otherwise.
            if reached == 0 and (not runs or runs.get("result", 0) > finished):
                raise


class RemoteLayer:
    """One layer of it: the values of the step that is running.

    Args:
        replacement: Its transcoder.
        where: The paths that it reads and writes.
    """

    def __init__(self, replacement: Replacement, where: dict[str, Any]) -> None:
        self.replacement, self._where = replacement, where
        self.layer, self.mode = replacement.layer, replacement.mode
        self.columns = replacement.columns
        self._late = replacement.reads_output
        self._tree: Any = None
        self._norm: NormSpec | None = None
        self._handed_out: list[tuple[Tensor, int]] = []
        for name in _NAMES:
            setattr(self, name, RemoteValue(self, name))

    # -- the edit's side -------------------------------------------------------------------------

    def open(self, edited: Any) -> None:
        """A run begins."""
        self._tree, self._handed_out = edited, []

    def read(self) -> Tensor:
        """The value at the input site, as the model has it."""
        if self._late:
            output = self._tree.get(self._where["output"]).output
            return output[0] if isinstance(output, tuple) else output
        residual, norm = self._where["residual"], self._where["norm"]
        x = None if residual is None else self._tree.get(residual).input
        if norm is not None and self._norm is None and x is not None:
            self._norm = called_norm(self._tree, norm, x)
        mlp_in = self._tree.get(self._where["mlp_in"]).input
        return mlp_in if x is None else x

    def begin(self, x: Tensor, index: Tensor, state: dict[int, RemoteLayer]) -> None:
        """Start a step at the input site's value ``(batch, pos, d_in)``."""
        if self._norm is not None:
            x = self._norm.site_n0(x)
        self.check()
        self.replacement.to(x.device)
        self._x, self._below = x, dict(state)
        self.current_token_index = index.to(x.device)
        with exactly(x):
            self._pre = self.replacement.transcoder.pre_activations(x)
            self._clean: Tensor | None = None
            if self.mode != "replace":
                self._clean = self.replacement.activations(self._pre, self.current_token_index)
        self._acts: Tensor | None = None
        self._reconstruction: Tensor | None = None
        self._error: Tensor | None = None
        self._rows = torch.arange(len(x), device=x.device)
        self._encoded = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self._decoded = torch.zeros_like(self._encoded)
        state[self.layer] = self

    def end(self) -> None:
        """Put what the features are now in the MLP's place."""
        written = self._tree.get(self._where["output"])
        output = written.output
        y, *others = output if isinstance(output, tuple) else (output,)
        self._y = y.reshape(*self.current_token_index.shape, -1)
        reconstruction = self._reconstructed(self._rows)
        if self.mode != "replace":
            clean: dict[int, Any] = {n: below._clean for n, below in self._below.items()}
            assert self._clean is not None
            with exactly(self._x):
                decoded = self.replacement.decode(self._clean, self._x, clean)
            self._error = difference(self._y, decoded)
        if self.mode != "observe":
            out = self._out(reconstruction).reshape(y.shape)
            written.output = (out, *others) if others else out
        if self._late:  # blocks have not had their turn
            self._decoded[:] = False

    def check(self) -> None:
        """Check that nothing was lost.

        Raises:
            InputError: An error was changed in place, which nobody saw.
        """
        if any(value._version != version for value, version in self._handed_out):
            raise InputError(
                f"the error of layer {self.layer} was changed in place, which has no effect in a "
                f"remote job: assign it (replaced.transcoders[{self.layer}].error.output = ...)"
            )
        self._handed_out = []

    def _out(self, reconstruction: Tensor) -> Tensor:
        index = self.current_token_index
        # A copy: some models add to the MLP's output in place (Falcon).
        return self.replacement.written(self._y, reconstruction, self._error, index).clone()

    # -- a block's side --------------------------------------------------------------------------

    def get(self, name: str) -> Tensor:
        """The running block's rows of a value, once the model is there."""
        if name == "error":
            value = self._get_error()
            self._handed_out.append((value, value._version))
            return value
        self._wait()
        if name == "token_index":
            return invoke_rows(self.current_token_index)
        rows = invoke_rows(self._rows)
        if name == "reconstruction":
            return self._handed(name, invoke_rows(self._reconstructed(rows)))
        if bool(self._decoded[rows].any()):
            raise InputError(
                f"the {name} of layer {self.layer} come before its reconstruction: read and edit "
                "them first"
            )
        value = self._pre if name == "pre_activations" else self._features(rows)
        return self._handed(name, invoke_rows(value))

    def _wait(self) -> None:
        if self._late:
            _ = self._tree.get(self._where["output"]).output
        else:
            _ = self._tree.get(self._where["mlp_in"]).input

    def _handed(self, name: str, value: Tensor) -> Tensor:
        """A value as a block gets it: of an autoencoder, watched."""
        if not self._late:
            return value
        rows = invoke_rows(self._rows)

        def changed() -> None:
            if name == "reconstruction":
                self._write_again()
            elif not bool(self._decoded[rows].any()):
                if name == "pre_activations":
                    self._encoded[rows] = False
                self._write_again()
                self._decoded[rows] = False

        return Watched.of(value, changed)

    def put(self, name: str, value: Tensor) -> None:
        """Give the running block's rows of a value another one."""
        if name == "token_index":
            raise InputError("token_index cannot be assigned in a remote job")
        if name == "error":
            self._handed_out = []
            self._get_error().copy_(value)
            self._write_again()
            return
        own = self.get(name)
        if own is not value:
            own.copy_(value)
        if name == "pre_activations":
            self._encoded[invoke_rows(self._rows)] = False

    def _get_error(self) -> Tensor:
        _ = self._tree.get(self._where["output"]).output  # waits
        if self._error is None:
            raise InputError(
                f"transcoders.{self.layer}.error.output: there is no error in mode 'replace'"
            )
        return invoke_rows(self._error)

    def _write_again(self) -> None:
        if self.mode == "observe":
            return
        written = self._tree.get(self._where["output"])
        output = written.output
        y, *others = output if isinstance(output, tuple) else (output,)
        reconstruction = self._reconstructed(invoke_rows(self._rows))
        out = invoke_rows(self._out(reconstruction)).reshape(y.shape)
        written.output = (out, *others) if others else out

    def _features(self, rows: Tensor) -> Tensor:
        """Features of all rows, of which those asked for are computed now if they were not yet."""
        if self._acts is None:
            self._acts = torch.zeros_like(self._pre)
        todo = rows[~self._encoded[rows]]
        if len(todo):
            index = self.current_token_index[todo]
            self._acts[todo] = self.replacement.activations(self._pre[todo], index)
            self._encoded[todo] = True
        return self._acts

    def _reconstructed(self, rows: Tensor) -> Tensor:
        """Reconstructions, the same."""
        todo = rows[~self._decoded[rows]]
        if len(todo):
            acts = self._features(todo)[todo]
            below = {n: layer._features(todo)[todo] for n, layer in self._below.items()}
            with exactly(self._x):
                made = self.replacement.decode(acts, self._x[todo], below)
            if self._reconstruction is None:
                self._reconstruction = made.new_zeros(*self._x.shape[:2], made.shape[-1])
            self._reconstruction[todo] = made
            self._decoded[todo] = True
        assert self._reconstruction is not None
        return self._reconstruction


def exactly(like: Tensor) -> Any:
    """A server runs blocks in half precision (autocast); features are computed as locally, in the
    dtype of the transcoder's weights."""
    return torch.autocast(like.device.type, enabled=False)


class RemoteValue:
    """``features`` and the like: its ``output`` is read and assigned.

    Args:
        layer: Its layer.
        name: Which value.
    """

    def __init__(self, layer: RemoteLayer, name: str) -> None:
        self._layer, self._name = layer, name

    @property
    def output(self) -> Tensor:
        """The running block's rows."""
        return self._layer.get(self._name)

    @output.setter
    def output(self, value: Tensor) -> None:
        self._layer.put(self._name, value)
