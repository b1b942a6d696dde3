"""What a run works with, found and checked before the model runs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from nnsight_transcoders.errors import ConfigError, InputError
from nnsight_transcoders.models import hf_module, hub_name
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites
from nnsight_transcoders.transcoder import TranscoderConfig, torch_dtype

from .buffer import ActivationBuffer, ActivationCache, Share, TokenBatches
from .config import TrainConfig
from .data import Rows
from .held_out import HeldOut
from .init import transcoder_config
from .memory import check_memory
from .processes import Processes
from .stream import SiteReader, kept_positions, padded


@dataclass(frozen=True)
class Run:
    """What a run works with, checked."""

    model: Any
    config: TrainConfig
    sites: Sites
    processes: Processes
    remote: Any
    reader: SiteReader
    rows: Rows
    batches: TokenBatches
    shapes: dict[int, TranscoderConfig]
    base_model: str | None

    @classmethod
    def prepare(
        cls,
        model: Any,
        data: Any,
        config: TrainConfig,
        sites: Sites,
        processes: Processes,
        remote: Any,
        start: TranscoderSet | None,
    ) -> Run:
        layers = _layers(config, sites)
        _check_processes(config, processes)
        if config.end_to_end and (remote or start is None):
            what = "a model that is here" if remote else "a set to start from: pass start="
            raise ConfigError(f"objective {config.objective!r} needs {what}")
        limit = sites.max_positions
        if limit is not None and config.context > limit:
            raise ConfigError(f"context={config.context}, but the model takes {limit} positions")
        if config.parallel == "layers":
            layers = layers[processes.rank :: processes.world]
        base = hub_name(hf_module(model, weights=False))
        shapes = {n: transcoder_config(config, n, sites.d_model, base) for n in layers}
        reader = SiteReader(
            model, sites, layers, config.input_site, config.output_site, remote=remote
        )
        for device in {reader.device(layer) for layer in layers}:
            there = {n: shape for n, shape in shapes.items() if reader.device(n) == device}
            check_memory(config, there, device)
        tokenizer = getattr(model, "tokenizer", None)
        rows = Rows(
            data,
            tokenizer,
            context=config.context,
            pack=config.pack,
            text_column=config.text_column,
            vocab_size=sites.vocab_size,
            seed=config.seed,
        )
        shared = config.parallel == "data"
        share = Share(processes.rank, processes.world) if shared else Share()
        special, pad = _special(tokenizer, config)
        size = config.rows_per_forward
        if config.end_to_end:
            size = max(1, config.batch_size // config.context)
        batches = TokenBatches(rows, size, config.leading_positions, special, pad, share)
        return cls(model, config, sites, processes, remote, reader, rows, batches, shapes, base)

    def buffer(self, cache: ActivationCache | None) -> ActivationBuffer:
        """The buffer of this process."""
        c = self.config
        world = self.processes.world if c.parallel == "data" else 1
        return ActivationBuffer(
            self.batches,
            self.reader,
            size=max(min(c.buffer_size, c.steps * c.batch_size) // world, c.batch_size // world),
            batch_size=c.batch_size // world,
            seed=c.seed,
            devices={layer: self.reader.device(layer) for layer in self.shapes},
            dtype=torch_dtype(c.buffer_dtype),
            cache=cache,
        )

    def cache(self, first: list[list[int]]) -> ActivationCache | None:
        """Where activations are kept, under a name that tells what they are activations of."""
        c = self.config
        if c.cache is None:
            return None
        keys = ("context", "pack", "leading_positions", "special_tokens", "rows_per_forward")
        keys += ("buffer_size", "batch_size", "n_tokens", "buffer_dtype", "input_site")
        keys += ("output_site", "evaluate_every", "evaluate_rows")
        told = {key: getattr(c, key) for key in keys}
        told |= {"layers": list(self.shapes), "model": str(self.base_model), "rows": first}
        told["rank"] = [self.processes.rank, self.processes.world]
        weights = None if self.remote else _digest_of(hf_module(self.model))
        text = json.dumps([told, weights])
        return ActivationCache(Path(c.cache), hashlib.sha256(text.encode()).hexdigest()[:16])

    def held_out(self) -> tuple[HeldOut, list[list[int]]]:
        """Rows set aside at the beginning of the data, and their token ids."""
        c = self.config
        rows = list(islice(self.rows, c.evaluate_rows if c.evaluate_every else 0))
        special, pad = _special(getattr(self.model, "tokenizer", None), c)
        batches = []
        for i in range(0, len(rows), c.rows_per_forward):
            some = rows[i : i + c.rows_per_forward]
            ids = padded(some, pad)
            lengths = [len(row) for row in some]
            batches.append((ids, kept_positions(ids, lengths, c.leading_positions, special)))
        return HeldOut(self.model, self.sites, batches), rows


def like_set(config: TrainConfig, start: TranscoderSet) -> TrainConfig:
    """The config with what a set to train further decides."""
    first = start.config(start.layers[0])
    if first.activation not in ("relu", "jumprelu", "topk", "batchtopk", "grouptopk"):
        raise ConfigError(f"transcoders with activation {first.activation!r} cannot be trained")
    return config.replace(
        layers=start.layers,
        d_transcoder=first.d_transcoder,
        activation=first.activation,
        k=config.k if first.k is None else first.k,
        n_groups=first.n_groups,
        skip=first.skip,
        cross_layer=start.cross_layer,
        input_site=first.input_site,
        output_site=first.output_site,
        leading_positions=first.leading_positions,
    )


def _layers(config: TrainConfig, sites: Sites) -> tuple[int, ...]:
    if config.layers is None:
        return tuple(range(sites.n_layers))
    missing = [layer for layer in config.layers if not 0 <= layer < sites.n_layers]
    if missing:
        raise InputError(
            f"the model has layers 0 to {sites.n_layers - 1}; there is no layer "
            f"{', '.join(map(str, missing))}"
        )
    return tuple(sorted(config.layers))


def _check_processes(config: TrainConfig, processes: Processes) -> None:
    world = processes.world
    if world == 1:
        return
    if config.end_to_end:
        raise ConfigError(f"objective {config.objective!r} runs in one process, not in {world}")
    if config.parallel == "data" and config.batch_size % world:
        raise ConfigError(f"batch_size={config.batch_size} does not divide by {world} processes")
    if config.parallel == "layers" and config.cross_layer:
        raise ConfigError("the layers of a cross-layer transcoder cannot be shared out")


def _special(tokenizer: Any, config: TrainConfig) -> tuple[frozenset[int], int]:
    """The token ids that are left out, and what rows are padded with."""
    if tokenizer is None:
        return frozenset(), 0
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return frozenset() if config.special_tokens else frozenset(tokenizer.all_special_ids), pad


def _digest_of(module: torch.nn.Module) -> list[float]:
    """A few sums that tell models of one architecture apart."""
    return [
        float(p.detach().double().sum())
        for _, p in zip(range(4), module.parameters(), strict=False)
    ]
