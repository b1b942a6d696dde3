"""``TrainConfig``: everything that decides what a training run computes, in one flat mapping.

It is what a YAML file of ``nnsight-transcoders train`` holds, what is stored beside a checkpoint,
and what tells whether a checkpoint belongs to a run.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from nnsight_transcoders.errors import ConfigError
from nnsight_transcoders.transcoder import InputSite, OutputSite, torch_dtype

Activation = Literal["relu", "jumprelu", "topk", "batchtopk", "grouptopk"]
Objective = Literal["fvu", "mse", "kl", "ce"]
Sparsity = Literal["l1", "tanh", "l0"]
DecoderNorm = Literal["weighted", "unit"]
DecoderStart = Literal["zero", "tied", "random"]
Decay = Literal["cosine", "linear", "constant"]
Parallel = Literal["data", "layers"]

#: Keys that say what is shown and kept, not what is computed: they may differ when a run goes on.
FREE_KEYS = ("log_every", "log_to", "checkpoint_every", "cache")
#: What an activation needs to be sparse when nothing else is asked for.
_USUAL_SPARSITY: dict[str, Sparsity] = {"relu": "l1", "jumprelu": "l0"}


@dataclass(frozen=True)
class TrainConfig:
    """How transcoders are trained. Frozen, JSON-ready, unknown keys raise.

    Attributes:
        layers: Layers whose MLP gets a transcoder; None: all.
        d_transcoder: Features per layer; None: 16 times d_model.
        activation: ``relu``, ``jumprelu``, ``topk``, ``batchtopk`` or ``grouptopk``.
        k: Active features per position (mean over the batch for ``batchtopk``, per group for
            ``grouptopk``).
        n_groups: Groups of ``grouptopk``.
        skip: Add an affine skip path.
        cross_layer: One cross-layer transcoder instead of one transcoder per layer.
        input_site: Where it reads. The same as ``output_site`` makes a sparse autoencoder.
        output_site: What it reconstructs.
        leading_positions: First positions of each row that are left out of training and, when
            attached, left to the model's own MLP.
        dtype: Of the saved weights; training itself keeps float32.

        context: Tokens per row.
        pack: Join documents into rows of exactly ``context`` tokens; else one row per document, cut
            to ``context`` and padded, padding left out.
        special_tokens: Whether positions of special tokens (BOS, EOS, padding excepted) are
            trained on.
        text_column: Column of a ``datasets`` data set that holds the text.
        n_tokens: Positions to train on in all; steps = ``n_tokens // batch_size``.
        batch_size: Positions per step.
        buffer_size: Positions in the shuffled buffer, which bounds its memory.
        buffer_dtype: Dtype of the buffer.
        rows_per_forward: Rows that the model runs at once.
        cache: Folder to keep the activations in, for further runs on the same; None: not kept.

        objective: ``fvu``: squared error over the batch's variance; ``mse``: over the variance of
            the first activations; ``kl`` or ``ce``: end to end, with all layers replaced, through
            the model.
        sparsity: Penalty: ``l1``, ``tanh``, ``l0`` (JumpReLU only) or None; ``"auto"``: l1 for
            ``relu``, l0 for ``jumprelu``, none for the others.
        sparsity_weight: Its factor.
        sparsity_warmup: Share of the steps over which the factor rises from 0.
        tanh_scale: Steepness of ``tanh``.
        bandwidth: Width of the kernel in JumpReLU's straight-through gradients.
        threshold_start: JumpReLU's thresholds at the start.
        aux_weight: Factor of the auxiliary loss for dead features; 0: none.
        aux_k: How many dead features it uses per position; None: half of d_model.
        dead_after: A feature is dead when it has not fired for so many positions.
        decoder_norm: ``weighted``: decoder rows are free and the penalty weighs a feature with its
            row's norm; ``unit``: rows are kept at norm 1.
        decoder_start: ``zero``, ``tied`` (to the encoder) or ``random``; ``"auto"``: ``tied`` for
            an autoencoder, else ``zero`` where rows are free and ``random`` where they are not.

        optimizer: Name of a class in ``torch.optim``.
        optimizer_options: Its other arguments.
        lr: Peak learning rate; None: ``2e-4 / sqrt(d_transcoder / 2**14)``.
        warmup: Share of the steps over which it rises from 0.
        decay: Shape of its fall: ``cosine``, ``linear`` or ``constant``.
        decay_start: Share of the steps after which it falls.
        final_lr: What it falls to, as a share of the peak.
        clip_norm: Largest gradient norm of a layer; None: not clipped.
        autocast: ``"bfloat16"`` for the large products; None: float32.
        seed: Of weights and shuffling.
        parallel: What several processes share out: the ``data``, or the ``layers``.

        log_every: Steps between two lines of the log.
        log_to: Beside the progress bar and ``log.jsonl``: ``tensorboard``, ``wandb``, ``trackio``.
        evaluate_every: Steps between two measurements of the cross-entropy with the layers
            replaced; 0: never.
        evaluate_rows: Rows set aside for it at the beginning of the data.
        checkpoint_every: Steps between two checkpoints; 0: only at the end.
    """

    layers: tuple[int, ...] | None = None
    d_transcoder: int | None = None
    activation: Activation = "topk"
    k: int = 32
    n_groups: int | None = None
    skip: bool = False
    cross_layer: bool = False
    input_site: InputSite = "N1"
    output_site: OutputSite = "O"
    leading_positions: int = 1
    dtype: str = "float32"

    context: int = 128
    pack: bool = True
    special_tokens: bool = False
    text_column: str = "text"
    n_tokens: int = 10_000_000
    batch_size: int = 4096
    buffer_size: int = 65_536
    buffer_dtype: str = "float32"
    rows_per_forward: int = 16
    cache: str | None = None

    objective: Objective = "fvu"
    sparsity: Sparsity | Literal["auto"] | None = "auto"
    sparsity_weight: float = 1e-3
    sparsity_warmup: float = 0.2
    tanh_scale: float = 1.0
    bandwidth: float = 0.05
    threshold_start: float = 0.1
    aux_weight: float = 1 / 32
    aux_k: int | None = None
    dead_after: int = 1_000_000
    decoder_norm: DecoderNorm = "weighted"
    decoder_start: DecoderStart | Literal["auto"] = "auto"

    optimizer: str = "Adam"
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    lr: float | None = None
    warmup: float = 0.05
    decay: Decay = "cosine"
    decay_start: float = 0.0
    final_lr: float = 0.01
    clip_norm: float | None = 1.0
    autocast: str | None = None
    seed: int = 0
    parallel: Parallel = "data"

    log_every: int = 50
    log_to: tuple[str, ...] = ()
    evaluate_every: int = 0
    evaluate_rows: int = 16
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for name in ("layers", "log_to"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        _check_types(self)
        _check_choices(self)
        _check_ranges(self)
        _check_combinations(self)

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.n_tokens // self.batch_size

    @property
    def is_autoencoder(self) -> bool:
        """Whether it reads what it reconstructs."""
        return self.input_site == self.output_site

    @property
    def end_to_end(self) -> bool:
        """Whether the loss is the model's own."""
        return self.objective in ("kl", "ce")

    @property
    def penalty(self) -> Sparsity | None:
        """The sparsity penalty, with ``auto`` resolved."""
        return _USUAL_SPARSITY.get(self.activation) if self.sparsity == "auto" else self.sparsity

    @property
    def start(self) -> DecoderStart:
        """The decoder's start, with ``auto`` resolved."""
        if self.decoder_start != "auto":
            return self.decoder_start
        if self.is_autoencoder:
            return "tied"
        return "zero" if self.decoder_norm == "weighted" else "random"

    def learning_rate(self, d_transcoder: int) -> float:
        """The peak learning rate for so many features."""
        return self.lr if self.lr is not None else 2e-4 / math.sqrt(d_transcoder / 2**14)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary that ``from_dict`` reads back."""
        data = asdict(self)
        data["layers"] = None if self.layers is None else list(self.layers)
        data["log_to"] = list(self.log_to)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainConfig:
        """Read a mapping such as a YAML file holds.

        Raises:
            ConfigError: An unknown key (the message names the nearest one) or a bad value.
        """
        known = [f.name for f in fields(cls)]
        for key in data:
            if key not in known:
                raise ConfigError(unknown_key(key, known))
        return cls(**data)

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with some fields changed."""
        return replace(self, **changes)


def unknown_key(key: Any, known: list[str]) -> str:
    """The message for a key that does not exist."""
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return f"unknown training config key {key!r}; {hint}"


# -- checks --------------------------------------------------------------------------------------

_POSITIVE = ("context", "n_tokens", "batch_size", "buffer_size", "rows_per_forward", "k")
_POSITIVE += ("dead_after", "log_every", "evaluate_rows")
_NOT_NEGATIVE = ("leading_positions", "evaluate_every", "checkpoint_every", "seed")
_OPTIONAL_POSITIVE = ("d_transcoder", "n_groups", "aux_k")
_SHARES = ("sparsity_warmup", "warmup", "decay_start", "final_lr")
_NUMBERS = ("sparsity_weight", "aux_weight", "threshold_start")
_POSITIVE_NUMBERS = ("tanh_scale", "bandwidth")
_BOOLEANS = ("skip", "cross_layer", "pack", "special_tokens")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and math.isfinite(value)


def _require(good: bool, name: str, wanted: str, value: Any) -> None:
    if not good:
        raise ConfigError(f"{name} must be {wanted}, got {value!r}")


def _check_types(c: TrainConfig) -> None:
    for name in (*_POSITIVE, *_NOT_NEGATIVE, *_OPTIONAL_POSITIVE):
        value = getattr(c, name)
        least = 0 if name in _NOT_NEGATIVE else 1
        if name in _OPTIONAL_POSITIVE and value is None:
            continue
        wanted = "a positive integer" if least else "an integer of at least 0"
        _require(_whole(value) and value >= least, name, wanted, value)
    for name in _BOOLEANS:
        _require(isinstance(getattr(c, name), bool), name, "true or false", getattr(c, name))
    layers = c.layers
    if layers is not None:
        good = isinstance(layers, tuple) and len(layers) > 0 and all(_whole(n) for n in layers)
        _require(good and len(set(layers)) == len(layers), "layers", "a list of layers", layers)
    _require(isinstance(c.log_to, tuple), "log_to", "a list of names", c.log_to)
    _require(
        isinstance(c.optimizer_options, dict), "optimizer_options", "a mapping", c.optimizer_options
    )


def _check_choices(c: TrainConfig) -> None:
    choices: dict[str, tuple[Any, ...]] = {
        "activation": get_args(Activation),
        "input_site": get_args(InputSite),
        "output_site": get_args(OutputSite),
        "objective": get_args(Objective),
        "sparsity": (*get_args(Sparsity), "auto", None),
        "decoder_norm": get_args(DecoderNorm),
        "decoder_start": (*get_args(DecoderStart), "auto"),
        "decay": get_args(Decay),
        "parallel": get_args(Parallel),
        "autocast": ("bfloat16", None),
    }
    for name, options in choices.items():
        _require(getattr(c, name) in options, name, f"one of {options}", getattr(c, name))
    for name in c.log_to:
        options = ("tensorboard", "wandb", "trackio")
        _require(name in options, "log_to", f"a list of {', '.join(options)}", name)
    for name in ("dtype", "buffer_dtype"):
        _require(isinstance(getattr(c, name), str), name, "a torch dtype's name", getattr(c, name))
        torch_dtype(getattr(c, name))


def _check_ranges(c: TrainConfig) -> None:
    for name in _SHARES:
        value = getattr(c, name)
        _require(_number(value) and 0 <= value <= 1, name, "between 0 and 1", value)
    for name in _NUMBERS:
        value = getattr(c, name)
        _require(_number(value) and value >= 0, name, "a number of at least 0", value)
    for name in _POSITIVE_NUMBERS:
        value = getattr(c, name)
        _require(_number(value) and value > 0, name, "a number above 0", value)
    for name in ("lr", "clip_norm"):
        value = getattr(c, name)
        _require(value is None or (_number(value) and value > 0), name, "a number above 0", value)


def _check_combinations(c: TrainConfig) -> None:
    if c.n_tokens < c.batch_size:
        raise ConfigError(
            f"n_tokens={c.n_tokens} is less than one batch: raise it to at least "
            f"batch_size={c.batch_size}"
        )
    if c.buffer_size < c.batch_size and not c.end_to_end:
        raise ConfigError(
            f"buffer_size={c.buffer_size} is less than batch_size={c.batch_size}: raise it"
        )
    if c.leading_positions >= c.context:
        raise ConfigError(
            f"leading_positions={c.leading_positions} leaves nothing of a context of {c.context}"
        )
    if c.activation == "grouptopk" and c.n_groups is None:
        raise ConfigError("activation 'grouptopk' needs n_groups")
    if c.penalty == "l0" and c.activation != "jumprelu":
        raise ConfigError(
            "sparsity 'l0' works through JumpReLU's thresholds: set activation to 'jumprelu'"
        )
    if c.cross_layer and c.is_autoencoder:
        raise ConfigError("a cross-layer transcoder cannot read the site that it writes")
    if c.skip and c.is_autoencoder:
        raise ConfigError("an autoencoder with a skip path would learn the identity: skip=false")
    if c.start == "tied" and c.cross_layer:
        raise ConfigError("decoder_start 'tied' needs one decoder per encoder, not cross_layer")
    if c.start == "zero" and c.decoder_norm == "unit":
        raise ConfigError("decoder_norm 'unit' cannot start at zero: decoder_start 'random'")
