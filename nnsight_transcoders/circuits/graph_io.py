"""The file of an attribution graph: its tables in one safetensors file, the rest as JSON in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nnsight_transcoders._files import atomic_path
from nnsight_transcoders.errors import CheckpointError

#: Node kinds by code.
KINDS = ("feature", "error", "token", "logit")
FORMAT = "nnsight-transcoders/attribution-graph"
FORMAT_VERSION = 1


def write_graph(path: Path, tables: Mapping[str, Tensor], record: Mapping[str, Any]) -> Path:
    """Write a graph's tables and record.

    Raises:
        InputError: The folder cannot be written; nothing is left behind.
    """
    header = {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "record": json.dumps(record, allow_nan=False),
    }
    with atomic_path(path) as partial:
        save_file(dict(tables), partial, metadata=header)
    return path


def read_graph(path: Path, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``write_graph`` wrote: tables by name, and the record.

    Raises:
        CheckpointError: Not such a file, or a damaged one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise CheckpointError(f"{path} is not an attribution graph of this package")
            if int(header["version"]) > FORMAT_VERSION:
                raise CheckpointError(
                    f"{path} has graph format {header['version']}; this version reads up to "
                    f"{FORMAT_VERSION}: upgrade nnsight-transcoders"
                )
            tables = {name: file.get_tensor(name) for name in names}
            record = json.loads(header["record"])
        _check(tables, record)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"cannot read the graph {path}: {error}") from error
    return tables, record


def _check(tables: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Whether the tables of a file fit together.

    Raises:
        ValueError: Naming the one that does not.
        KeyError: The record lacks something.
    """
    n_nodes, n_edges = len(tables["kind"]), len(tables["weight"])
    for name, table in tables.items():
        expected = n_edges if name in ("source", "target", "weight") else n_nodes
        if tuple(table.shape) != (expected,):
            raise ValueError(f"{name} has shape {tuple(table.shape)}, expected ({expected},)")
    for name in ("source", "target"):
        if n_edges and not 0 <= int(tables[name].min()) <= int(tables[name].max()) < n_nodes:
            raise ValueError(f"{name} names nodes outside the graph's {n_nodes}")
    if n_nodes and int(tables["kind"].max()) >= len(KINDS):
        raise ValueError("there are nodes of an unknown kind")
    n_logits = int((tables["kind"] == KINDS.index("logit")).sum())
    if n_logits != len(record["target_names"]):
        raise ValueError("the number of target names is not that of the logit nodes")
    for name in ("tokens", "token_ids", "metadata"):
        if name not in record:
            raise KeyError(name)
