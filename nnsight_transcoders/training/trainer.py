"""``train``: from a model and text to a transcoder set.

Everything that can be wrong with the input is found out before the model runs. A run whose folder
holds a checkpoint goes on from it, to the same numbers as if it had never stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from nnsight_transcoders.errors import InputError
from nnsight_transcoders.layer_sources import MemorySource
from nnsight_transcoders.models import hf_module
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites, resolve_sites
from nnsight_transcoders.transcoder import torch_dtype

from .checkpoint import Checkpoint, CheckpointFolder, pack_optimizer, unpack_optimizer
from .config import TrainConfig
from .end_to_end import EndToEndSteps, frozen
from .group import Group
from .init import Part, Units, exported, imported, initialise, make_part, measure_units
from .logs import Log
from .metrics import by_layer, step_numbers
from .processes import Processes
from .run import Run, like_set
from .step import Learner
from .steps import LocalSteps, Steps

logger = logging.getLogger(__name__)


def train(
    model: Any,
    data: Any,
    config: TrainConfig | Mapping[str, Any],
    *,
    out: str | Path | None = None,
    start: TranscoderSet | None = None,
    sites: Sites | None = None,
    remote: Any = False,
    verbose: bool = True,
) -> TranscoderSet:
    """Train transcoders (or sparse autoencoders) on a model's activations.

    Args:
        model: An nnsight model; it stays as it is.
        data: ``"builtin"`` (the builtin model's text), a UTF-8 text file or a folder of ``.txt``
            files, a ``datasets`` data set (streaming or not), or any iterable of texts or of lists
            of token ids. Data that can be read again from the start is, when it ends too early.
        config: A ``TrainConfig`` or a mapping of its fields.
        out: Folder for checkpoints, the log and the finished set. What is there of the same run is
            gone on with. None: nothing is written.
        start: A set to train further; what it is (layers, width, activation, sites) is then its
            own and not ``config``'s. Needed for ``objective`` ``kl`` and ``ce``.
        sites: The model's sites, where they have to be given by hand.
        remote: Run the model on NDIF; the transcoders are trained here.
        verbose: Show the progress bar.

    Returns:
        The trained set, in memory; with ``out`` also saved there.

    Raises:
        ConfigError: An unknown key, a bad value, too little memory, or an ``out`` that belongs to
            another run.
        InputError: Layers that do not exist, or data that are empty, too short or not text.
        TrainingError: The loss became NaN or infinite; the last checkpoint is kept.
    """
    if not isinstance(config, TrainConfig):
        config = TrainConfig.from_dict(config)
    if start is not None:
        config = like_set(config, start)
    module = hf_module(model, weights=not remote)
    sites = sites or resolve_sites(module)
    run = Run.prepare(model, data, config, sites, Processes(), remote, start)
    folder = None if out is None else CheckpointFolder(Path(out), run.processes)
    if folder is not None:
        folder.claim(config, run.base_model or type(module).__name__)
    with ExitStack() as stack:
        if config.end_to_end:
            stack.enter_context(frozen(model))
        return _Trainer(run, folder, None if out is None else Path(out), verbose).train(start)


class _Trainer:
    """The loop: steps, log, measurements, checkpoints."""

    def __init__(
        self, run: Run, folder: CheckpointFolder | None, out: Path | None, verbose: bool
    ) -> None:
        self._run, self._folder, self._out, self._verbose = run, folder, out, verbose
        self._config, self._main = run.config, run.processes.is_main
        self._held_out, self._first_rows = run.held_out()
        self._last: dict[str, float] = {}

    def train(self, start: TranscoderSet | None) -> TranscoderSet:
        found = None if self._folder is None else self._folder.latest()
        checkpoint = None
        if found is not None:
            assert self._folder is not None
            checkpoint = self._folder.load(found)
        steps = self._steps(checkpoint, start)
        done = 0
        if checkpoint is not None:
            done, self._last = checkpoint.step, checkpoint.data["last"]
            if done < self._config.steps:
                steps.restore(checkpoint.data["position"])
        done = self._loop(steps, done)
        return self._finish(steps, done)

    # -- what is trained -------------------------------------------------------------------------

    def _steps(self, checkpoint: Checkpoint | None, start: TranscoderSet | None) -> Steps:
        """The learners, as they are at the beginning or in the checkpoint."""
        if self._config.end_to_end:
            return self._end_to_end(checkpoint, start)
        buffer = self._run.buffer(self._run.cache(self._first_rows))
        if checkpoint is not None:
            units = Units(*({int(n): f for n, f in u.items()} for u in checkpoint.data["units"]))
            parts = self._empty()
        else:
            sample = buffer.peek()
            units = measure_units(sample)
            if self._config.parallel != "layers":
                units = self._run.processes.gather([units])[0]
            parts = self._started(sample, units) if start is None else _imported(start, units)
        learners = self._learners(parts, units)
        if checkpoint is not None:
            _restore(learners, checkpoint)
        return LocalSteps(buffer, learners)

    def _end_to_end(self, checkpoint: Checkpoint | None, start: TranscoderSet | None) -> Steps:
        assert start is not None
        one = Units(dict.fromkeys(start.layers, 1.0), dict.fromkeys(start.layers, 1.0))
        (learner,) = self._learners(_imported(start, one), one, together=True)
        if checkpoint is not None:
            _restore([learner], checkpoint)
        return EndToEndSteps(self._run.model, self._run.sites, self._run.batches, learner)

    def _empty(self) -> dict[int, Part]:
        layers = tuple(self._run.shapes)
        threshold = self._config.threshold_start
        return {n: make_part(shape, layers, threshold) for n, shape in self._run.shapes.items()}

    def _started(self, sample: Any, units: Units) -> dict[int, Part]:
        parts = self._empty()
        for layer, part in parts.items():
            x, y = sample[layer]
            generator = torch.Generator().manual_seed((self._config.seed << 16) + layer)
            x = x.float().cpu() * units.inputs[layer]
            initialise(part, self._config, x, y.float().cpu() * units.outputs[layer], generator)
        return parts

    def _learners(
        self, parts: dict[int, Part], units: Units, together: bool = False
    ) -> list[Learner]:
        for layer, part in parts.items():
            part.to(self._run.reader.device(layer))
            part.requires_grad_(True)
        together = together or self._config.cross_layer
        groups = [parts] if together else [{n: part} for n, part in parts.items()]
        return [
            Learner(Group(group, self._config, units), self._config, self._run.processes)
            for group in groups
        ]

    # -- the loop --------------------------------------------------------------------------------

    def _loop(self, steps: Steps, done: int) -> int:
        c = self._config
        if done >= c.steps:
            return done
        shown = self._verbose and self._main
        log = Log(c, self._out if self._main else None, done, shown, services=self._main)
        try:
            while done < c.steps:
                result = steps.step(done)
                if result is None:
                    logger.warning("the training data ended after %d of %d steps", done, c.steps)
                    break
                done += 1
                log.advance(c.batch_size)
                measured = bool(c.evaluate_every) and done % c.evaluate_every == 0
                if measured or done % c.log_every == 0 or done == c.steps:
                    values = self._measured(steps) if measured else {}
                    self._last = step_numbers(steps, *result, c, self._run.processes) | values
                    log.write(done, self._last)
                if c.checkpoint_every and done % c.checkpoint_every == 0 and done < c.steps:
                    self._save(steps, done)
        finally:
            log.close()
        if not done:
            raise InputError("the training data ended before the first step: give more text")
        self._save(steps, done)
        return done

    def _measured(self, steps: Steps) -> dict[str, float]:
        """The cross-entropy with the layers replaced; the main process measures it."""
        transcoders = self._set(steps, torch.float32)
        if self._run.remote or not self._main:
            return {}
        return self._held_out.ce_change(transcoders)

    def _save(self, steps: Steps, done: int) -> None:
        if self._folder is None:
            return
        tensors, optimizers = {}, []
        for i, learner in enumerate(steps.learners):
            own, rest = pack_optimizer(learner.optimizer, f"optimizer_{i}")
            weights = {f"group_{i}.{k}": v for k, v in learner.group.state_dict().items()}
            tensors |= own | weights
            optimizers.append(rest)
        units = [learner.group.units for learner in steps.learners]
        data = {
            "position": steps.state(),
            "optimizers": optimizers,
            "units": [
                {n: f for u in units for n, f in u.inputs.items()},
                {n: f for u in units for n, f in u.outputs.items()},
            ],
            "last": self._last,
        }
        self._folder.save(Checkpoint(done, tensors, data))

    # -- the end ---------------------------------------------------------------------------------

    def _set(self, steps: Steps, dtype: torch.dtype) -> TranscoderSet:
        parts = {
            n: exported(learner.group.part(n), learner.group.units, dtype)
            for learner in steps.learners
            for n in learner.group.layers
        }
        if self._config.parallel == "layers":
            gathered = self._run.processes.gather([parts])
            parts = {n: part for some in gathered for n, part in some.items()}
        provenance = {"format": "trained", "config": self._config.to_dict()}
        return TranscoderSet(MemorySource(parts, provenance))

    def _finish(self, steps: Steps, done: int) -> TranscoderSet:
        trained = self._set(steps, torch_dtype(self._config.dtype))
        if self._out is not None and self._main:
            metrics: dict[Any, Any] = {"steps": done, **by_layer(self._last)}
            trained.save_pretrained(self._out, metrics=metrics)
        self._run.processes.wait()
        return trained


def _imported(start: TranscoderSet, units: Units) -> dict[int, Part]:
    return {layer: imported(start[layer], units) for layer in start.layers}


def _restore(learners: list[Learner], checkpoint: Checkpoint) -> None:
    for i, learner in enumerate(learners):
        prefix = f"group_{i}."
        state = {
            name.removeprefix(prefix): tensor
            for name, tensor in checkpoint.tensors.items()
            if name.startswith(prefix)
        }
        learner.group.load_state_dict(state)
        rest = checkpoint.data["optimizers"][i]
        unpack_optimizer(learner.optimizer, f"optimizer_{i}", checkpoint.tensors, rest)
