"""What a graph can be made into or made from: named nodes, other tools' files, interventions.

A base class of ``AttributionGraph``, so that the graph's own module stays about the graph. Each
method imports what it needs when it is called.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from nnsight_transcoders.sets import TranscoderSet
    from nnsight_transcoders.sites import Sites

    from .graph import AttributionGraph, Node
    from .interventions import Intervention


class GraphExports:
    """Methods of ``AttributionGraph``."""

    def named(
        self: Any,
        supernodes: Mapping[str, Iterable[int | str | Node]] | None = None,
        pinned: Iterable[int | str | Node] | None = None,
        labels: Mapping[int | str | Node, str] | None = None,
    ) -> AttributionGraph:
        """The same graph with groups, pinned nodes or labels; nodes by number, id or ``Node``.

        They go into the files of other tools and may be used in ``intervene``. What is not given
        stays as it is.

        Args:
            supernodes: Name -> its nodes.
            pinned: Nodes to show first.
            labels: Node -> text.

        Raises:
            InputError: A node that is not in the graph, or a supernode without nodes.
        """
        from .grouping import with_names

        return with_names(self, supernodes, pinned, labels)

    def intervene(
        self: Any,
        changes: Mapping[Any, float],
        model: Any,
        transcoders: TranscoderSet,
        *,
        constrained: Collection[int] = (),
        freeze_attention: bool = True,
        mlps: Literal["model", "transcoders"] = "model",
        read: Collection[Any] | None = None,
        directions: Mapping[str, Tensor] | None = None,
        sites: Sites | None = None,
        remote: Any = None,
    ) -> Intervention:
        """Run the real model with some nodes changed, next to what the graph predicts.

        Args:
            changes: What to multiply nodes by: ``{node: 0, supernode: -2.0}``. A node is named by
                its number, its id or a ``Node``; several by a supernode's name or a tuple. A
                feature is held at this multiple of its activation on the prompt, whatever the
                other changes do to it, and a token's embedding likewise. Of an error, this multiple
                of its value on the prompt stands in the place of that value.
            model: The nnsight model the graph was made with; for a remote run its module tree is
                enough.
            transcoders: The set it was made with.
            constrained: Layers whose features and errors are held at their original values (but
                for the changed features), so that only direct effects pass them: *constrained
                patching*, such as ``range(3, 8)``. With all layers, the effects are the graph's
                edges. Default: none, *open-ended*: every layer responds.
            freeze_attention: Keep attention patterns and normalisation denominators at the
                prompt's values, as the graph does. Needs an attention that can be written down.
            mlps: What responds in a layer that is not constrained: ``"model"``, its own MLP; or
                ``"transcoders"``, its features, its error held (the local replacement model).
            read: Features whose activations are measured: nodes or supernodes. Default: all of
                the graph's. Those that are changed are among them in any case.
            directions: Name -> vector ``(d_model,)``, for targets that are directions.
            sites: The model's sites, where they have to be given by hand.
            remote: The model is on a server: True, an address, or a ``RemoteServer``. One request
                (two if errors are changed) takes the encoder rows of the features that are read
                and the decoder rows of those that are changed.

        Raises:
            InputError: A node that is not in the graph or is a target, or nothing to change.
            MismatchError: The graph is of another model or set.
            SiteError: The attention cannot be written down, so that it cannot be frozen.
            RemoteError: The server, or the job there, failed.
        """
        from .interventions import intervene

        return intervene(
            self,
            changes,
            model,
            transcoders,
            constrained=constrained,
            freeze_attention=freeze_attention,
            mlps=mlps,
            read=read,
            directions=directions,
            sites=sites,
            remote=remote,
        )

    # -- other tools' files ----------------------------------------------------------------------

    def to_neuronpedia(
        self: Any,
        path: str | Path | None = None,
        *,
        slug: str,
        model_id: str,
        source_set: str | None = None,
        feature_url: str | None = None,
        node_threshold: float = 0.8,
        edge_threshold: float = 0.98,
        description: str | None = None,
        creator: str | None = None,
    ) -> dict[str, Any]:
        """The graph as Neuronpedia's JSON, checked against its schema and unwritten rules.

        Supernodes, pinned nodes and labels (``named``) are in it.

        Args:
            path: Where to write it, if anywhere.
            slug: The graph's name: letters, digits, ``_``, ``.`` and ``-``.
            model_id: Neuronpedia's id of the model, such as ``"gemma-2-2b"``.
            source_set: Neuronpedia's source set of the transcoders, whose dashboards it shows.
            feature_url: Instead: ``https://`` address of a folder of feature JSON files.
            node_threshold: See ``prune``; a pruned graph is exported as it is.
            edge_threshold: See there.
            description: Shown with the graph.
            creator: Shown with the graph.

        Returns:
            The JSON as Python objects.

        Raises:
            InputError: A name that cannot be part of an address.
            CheckpointError: A graph that Neuronpedia would refuse; the message says why.
        """
        from nnsight_transcoders.interop.write_json import neuronpedia_json, write_json

        data = neuronpedia_json(
            self,
            slug=slug,
            model_id=model_id,
            source_set=source_set,
            feature_url=feature_url,
            node_threshold=node_threshold,
            edge_threshold=edge_threshold,
            description=description,
            creator=creator,
        )
        if path is not None:
            write_json(data, Path(path))
        return data

    def to_circuit_tracer(
        self: Any,
        path: str | Path,
        *,
        slug: str | None = None,
        scan: str | None = None,
        node_threshold: float = 0.8,
        edge_threshold: float = 0.98,
        config: dict[str, Any] | None = None,
    ) -> Path:
        """The graph as circuit-tracer's files: a ``.pt`` graph, or a folder for its local page.

        Args:
            path: A file that ends in ``.pt``: the whole graph as it is, for ``Graph.from_pt``. Or a
                folder, for ``circuit-tracer start-server``: gets ``{slug}.json``, pruned, and an
                entry in ``graph-metadata.json``.
            slug: The graph's name in the folder (needed there).
            scan: The transcoders' Hub id, where the page looks for features, or the address of a
                folder of feature files below the served one, ``"./data/features"``. Default: the
                name of the set that the graph was made with.
            node_threshold: See ``prune``; a pruned graph is exported as it is.
            edge_threshold: See there.
            config: Of a ``.pt`` graph: what circuit-tracer's record of the model should say where
                the graph does not know it (``d_head``, ``d_mlp``, ``tokenizer_name``, ...).

        Returns:
            The file with the graph.

        Raises:
            InputError: No slug for a folder, or a graph too large for a dense matrix.
            CheckpointError: A graph that the page could not show; the message says why.
        """
        from nnsight_transcoders.errors import InputError
        from nnsight_transcoders.interop.write_json import (
            circuit_tracer_json,
            write_circuit_tracer_folder,
        )
        from nnsight_transcoders.interop.write_pt import write_graph_pt

        path = Path(path)
        name = scan or _set_name(self.metadata)
        if path.suffix == ".pt":
            return write_graph_pt(self, path, scan=name, config=config)
        if slug is None:
            raise InputError("a folder for circuit-tracer's page needs slug=, the graph's name")
        data = circuit_tracer_json(
            self,
            slug=slug,
            scan=name or "unknown",
            node_threshold=node_threshold,
            edge_threshold=edge_threshold,
        )
        return write_circuit_tracer_folder(data, path)

    @classmethod
    def from_neuronpedia(cls, source: str | Path | Mapping[str, Any]) -> AttributionGraph:
        """Read graph JSON: Neuronpedia's, circuit-tracer's, or what this package wrote.

        Our own files come back as the pruned graph that was written. Others' record no totals,
        constant terms or vectors' norms: the graph's ``metadata["totals"]`` says so, and its
        ``completeness_error`` means nothing.

        Args:
            source: A file, or the JSON as Python objects.

        Raises:
            CheckpointError: It is no such graph; the message names the node or link and the remedy.
        """
        from nnsight_transcoders.interop.read_json import read_graph_json

        return read_graph_json(source)

    @classmethod
    def from_circuit_tracer(cls, path: str | Path) -> AttributionGraph:
        """Read a graph of circuit-tracer: its ``.pt`` file or its page's JSON.

        Nothing in a ``.pt`` file is executed. It holds token ids but not their text: the graph's
        tokens are ``<id>``; ``with_tokens`` gives them theirs.

        Raises:
            CheckpointError: It is no such graph, is damaged, or asks for more than data.
        """
        from nnsight_transcoders.interop.graph_pt import read_graph_pt
        from nnsight_transcoders.interop.read_json import read_graph_json

        path = Path(path)
        return read_graph_pt(path) if path.suffix == ".pt" else read_graph_json(path)

    def with_tokens(self: Any, tokenizer: Any) -> AttributionGraph:
        """The same graph with the texts that a tokenizer has for its token ids."""
        texts = tuple(
            tokenizer.decode([i]) if i >= 0 else text
            for i, text in zip(self.token_ids, self.tokens, strict=True)
        )
        return replace(self, tokens=texts)


def _set_name(metadata: Mapping[str, Any]) -> str | None:
    """What the transcoder set is called in a graph's record, if it has a name."""
    known = metadata.get("transcoders")
    name = known.get("repository") if isinstance(known, Mapping) else None
    return name if isinstance(name, str) else None
