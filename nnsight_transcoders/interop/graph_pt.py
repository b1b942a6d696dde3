"""circuit-tracer's ``.pt`` graphs, read without its classes and without unpickling.

Its file is a ``torch.save`` of a dict with objects of two of its own classes in it (the model's
config and the logit targets), which it loads with ``weights_only=False``. Here it goes through this
package's restricted reader, with inert stand-ins for those classes.

Its nodes are in the order features, errors by layer and position, tokens, logits; its adjacency
matrix has targets as rows; a target that is no token has an id beyond the vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnsight_transcoders.circuits.graph import ERROR, FEATURE, LOGIT, TOKEN, AttributionGraph
from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.hub.restricted_pickle import Record, TensorRecord
from nnsight_transcoders.hub.torch_files import open_torch_file

from .read_json import NOT_RECORDED

CONFIG_CLASS = ("circuit_tracer.utils.tl_nnsight_mapping", "UnifiedConfig")
TARGET_CLASS = ("circuit_tracer.attribution.targets", "LogitTarget")
_TENSORS = (
    "adjacency_matrix",
    "active_features",
    "selected_features",
    "activation_values",
    "logit_probabilities",
)


#: A file with more layers than this is not believed.
MAX_LAYERS = 10_000


class LogitTarget(NamedTuple):
    """Stands for circuit-tracer's class."""

    token_str: str
    vocab_idx: int


class _Config(Record):
    """Stands for circuit-tracer's config, or TransformerLens' in older files."""


_STAND_INS: dict[tuple[str, str], type] = {
    CONFIG_CLASS: _Config,
    TARGET_CLASS: LogitTarget,
    ("transformer_lens.HookedTransformerConfig", "HookedTransformerConfig"): _Config,
    ("transformer_lens.config.HookedTransformerConfig", "HookedTransformerConfig"): _Config,
    ("transformer_lens.config.hooked_transformer_config", "HookedTransformerConfig"): _Config,
}


def read_graph_pt(path: Path) -> AttributionGraph:
    """See ``AttributionGraph.from_circuit_tracer``."""
    try:
        with path.open("rb") as file, open_torch_file(file, str(path), _STAND_INS) as opened:
            content, read = opened
            if not isinstance(content, dict):
                raise CheckpointError(f"{path} is no graph of circuit-tracer: it holds no mapping")
            content = {
                key: read(value) if isinstance(value, TensorRecord) else value
                for key, value in content.items()
            }
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    return _graph(content, str(path))


def _graph(content: dict[str, Any], where: str) -> AttributionGraph:
    n_layers, vocabulary, tokens, targets = _checked(content, where)
    features = content["active_features"][content["selected_features"]].long()
    values = content["activation_values"].float()
    # One entry per active feature, or (of older files) one per selected feature.
    if len(values) == len(content["active_features"]):
        values = values[content["selected_features"]]
    n, n_positions, n_logits = len(features), len(tokens), len(targets)
    layers, everywhere = torch.arange(n_layers), torch.arange(n_positions)
    ids = [target.vocab_idx for target in targets]
    index = torch.tensor([i if i < vocabulary else vocabulary - 1 - i for i in ids])
    n_errors, zeros = n_layers * n_positions, torch.zeros
    kinds = ((FEATURE, n), (ERROR, n_errors), (TOKEN, n_positions), (LOGIT, n_logits))
    adjacency = content["adjacency_matrix"].float()
    target_of, source_of = adjacency.nonzero(as_tuple=True)
    weight = adjacency[target_of, source_of]
    n_nodes = len(adjacency)
    last = torch.full((n_logits,), n_positions - 1)
    return AttributionGraph(
        kind=torch.cat([torch.full((count,), kind, dtype=torch.uint8) for kind, count in kinds]),
        layer=torch.cat(
            [
                features[:, 0],
                layers.repeat_interleave(n_positions),
                torch.full((n_positions,), -1),
                torch.full((n_logits,), n_layers),
            ]
        ),
        position=torch.cat([features[:, 1], everywhere.repeat(n_layers), everywhere, last]),
        index=torch.cat([features[:, 2], torch.full((n_errors,), -1), tokens, index]),
        value=torch.cat([values, zeros(n_nodes - n)]),
        source=source_of,
        target=target_of,
        weight=weight,
        total=zeros(n_nodes).index_add(0, target_of, weight),
        bias=zeros(n_nodes),
        omitted=zeros(n_nodes),
        probability=torch.cat(
            [zeros(n_nodes - n_logits), content["logit_probabilities"].float().cpu()]
        ),
        tokens=tuple(f"<{i}>" for i in tokens.tolist()),
        token_ids=tuple(tokens.tolist()),
        target_names=tuple(target.token_str or f"<{target.vocab_idx}>" for target in targets),
        metadata=_metadata(content, n_layers, vocabulary),
    )


def _require(sound: bool, where: str, what: str) -> None:
    if not sound:
        raise CheckpointError(f"{where} is no graph of circuit-tracer: {what}")


def _checked(content: dict[str, Any], where: str) -> tuple[int, int, Tensor, list[LogitTarget]]:
    """Number of layers, vocabulary size, token ids and targets, once everything fits together.

    Raises:
        CheckpointError: Saying what does not.
    """
    for name in _TENSORS:
        _require(isinstance(content.get(name), Tensor), where, f"it has no tensor {name!r}")
    config = content.get("cfg")
    # Its attributes, not what the file may have put on its class.
    known = vars(config) if isinstance(config, Record) else {}
    n_layers = known.get("n_layers")
    if type(n_layers) is not int or not 0 < n_layers < MAX_LAYERS:
        raise CheckpointError(f"{where} is no graph of circuit-tracer: its cfg has no n_layers")
    vocabulary = content.get("vocab_size") or known.get("d_vocab")
    if type(vocabulary) is not int or not 0 < vocabulary < 1 << 40:
        raise CheckpointError(f"{where} is no graph of circuit-tracer: it has no vocab_size")
    tokens, targets = _tokens(content, where), _targets(content, where)
    _check_features(content, n_layers, len(tokens), where)
    adjacency, selected = content["adjacency_matrix"], content["selected_features"]
    n_nodes = len(selected) + (n_layers + 1) * len(tokens) + len(targets)
    shape = tuple(adjacency.shape)
    expected = f"adjacency_matrix has shape {shape}, expected ({n_nodes}, {n_nodes})"
    _require(shape == (n_nodes, n_nodes), where, expected)
    finite = bool(adjacency.isfinite().all())
    _require(finite, where, "adjacency_matrix has entries that are no numbers")
    chances = content["logit_probabilities"]
    _require(chances.shape == (len(targets),), where, "logit_probabilities are not one per target")
    _check_upward(content, n_layers, len(tokens), where)
    return n_layers, vocabulary, tokens, targets


def _tokens(content: dict[str, Any], where: str) -> Tensor:
    tokens = content.get("input_tokens")
    if isinstance(tokens, list) and all(type(i) is int and 0 <= i < 1 << 40 for i in tokens):
        tokens = torch.tensor(tokens)
    if not isinstance(tokens, Tensor) or tokens.dim() != 1 or not len(tokens):
        raise CheckpointError(f"{where} is no graph of circuit-tracer: it has no input_tokens")
    return tokens.long()


def _targets(content: dict[str, Any], where: str) -> list[LogitTarget]:
    targets = content.get("logit_targets")
    if isinstance(targets, Tensor):  # as older versions wrote them
        targets = [LogitTarget("", int(i)) for i in targets.flatten().tolist()]
    sound = isinstance(targets, list) and all(isinstance(one, LogitTarget) for one in targets)
    if not sound or not targets:
        raise CheckpointError(f"{where} is no graph of circuit-tracer: it has no logit_targets")
    # A file may put methods on its own stand-in classes, so that these are read as mere tuples.
    pairs = [tuple.__getitem__(target, slice(2)) for target in targets]
    for text, number in pairs:
        sound = isinstance(text, str) and type(number) is int and 0 <= number < 1 << 40
        _require(sound, where, "its logit_targets are not (text, vocabulary id)")
    return [LogitTarget(*pair) for pair in pairs]


def _check_features(content: dict[str, Any], n_layers: int, n_positions: int, where: str) -> None:
    active, selected = content["active_features"], content["selected_features"]
    shaped = active.dim() == 2 and active.shape[1] == 3 and not active.is_floating_point()
    _require(shaped, where, "active_features must be whole numbers (n, 3)")
    inside = not len(selected) or 0 <= int(selected.min()) <= int(selected.max()) < len(active)
    _require(selected.dim() == 1 and inside, where, "selected_features are not among the active")
    upper = torch.tensor([n_layers, n_positions, 1 << 40])
    possible = bool((active >= 0).all()) and bool((active < upper).all())
    _require(possible, where, "active_features have layers, positions or indices that cannot be")
    shape = content["activation_values"].shape
    per_feature = shape in ((len(active),), (len(selected),))
    _require(per_feature, where, "activation_values are not one per feature")


def _check_upward(content: dict[str, Any], n_layers: int, n_positions: int, where: str) -> None:
    """Edges point from lower to higher layers, and not into errors or tokens."""
    adjacency = content["adjacency_matrix"]
    features = content["active_features"][content["selected_features"]]
    n, last_input = len(features), len(features) + (n_layers + 1) * n_positions
    layer = torch.cat(
        [
            features[:, 0].long(),
            torch.arange(n_layers).repeat_interleave(n_positions),
            torch.full((n_positions,), -1),
            torch.full((len(adjacency) - last_input,), n_layers),
        ]
    )
    target, source = adjacency.nonzero(as_tuple=True)
    upward = bool((layer[source] < layer[target]).all())
    _require(upward, where, "it has edges that do not point upward")
    into_inputs = bool(((target >= n) & (target < last_input)).any())
    _require(not into_inputs, where, "it has edges into error nodes or tokens")


def _metadata(content: dict[str, Any], n_layers: int, vocabulary: int) -> dict[str, Any]:
    config = vars(content["cfg"])
    plain = {k: v for k, v in config.items() if isinstance(v, str | int | float | bool)}
    scan = content.get("scan")
    prompt = content.get("input_string")
    return {
        "n_layers": n_layers,
        "vocab_size": vocabulary,
        "model": str(plain.get("model_name", "")),
        "prompt": prompt if isinstance(prompt, str) else "",
        "totals": NOT_RECORDED,
        "circuit_tracer": {
            "scan": scan if isinstance(scan, str | list) else None,
            "config": plain,
        },
    }
