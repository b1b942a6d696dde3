"""Several remote graphs together: one request collects all their runs, a second one their edges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from nnsight_transcoders.circuits.graph import AttributionGraph
from nnsight_transcoders.errors import InputError

from .graph import PHASES, RemoteGraph, naming


class RemoteGraphs(Sequence[RemoteGraph]):
    """Graphs under way that share their requests, from ``submit_graphs``; ``result`` ends them.

    What they ask for is one request in each phase, as long as it fits into the server settings'
    ``max_bytes``; else as few as do. Until its graph is made, a prompt's run and the vectors of its
    active features are held here.

    Args:
        graphs: Graphs of one model on one server, from ``submit_graph(..., send=False)``.

    Raises:
        InputError: There is none, or they are of different models or servers.
    """

    def __init__(self, graphs: Sequence[RemoteGraph]) -> None:
        if not graphs:
            raise InputError("no prompt was given")
        self._graphs = list(graphs)
        self._jobs = self._graphs[0].jobs
        for graph in self._graphs[1:]:
            graph.share(self._jobs)

    def __getitem__(self, index: Any) -> Any:
        return self._graphs[index]

    def __len__(self) -> int:
        return len(self._graphs)

    def __iter__(self) -> Iterator[RemoteGraph]:
        return iter(self._graphs)

    def __repr__(self) -> str:
        return f"RemoteGraphs({len(self)} graphs, {self.n_requests} requests sent)"

    @property
    def n_requests(self) -> int:
        """How many requests were sent for all of them."""
        return self._jobs.n_requests

    def send(self) -> RemoteGraphs:
        """Send the first request now, unless it was sent, and do not wait for it.

        Raises:
            RemoteError: It could not be sent; ``error.graph`` is this object.
        """
        with naming(self):
            self._jobs.send("collect", self._graphs)
        return self

    def status(self) -> str:
        """What they wait for, in words: how many graphs are where."""
        found = [graph.status() for graph in self._graphs]
        return ", ".join(f"{found.count(one)} {one}" for one in dict.fromkeys(found))

    def resubmit(self) -> RemoteGraphs:
        """See ``RemoteGraph.resubmit``."""
        for graph in self._graphs:
            graph.resubmit()
        return self

    def result(self, timeout: float | None = None) -> list[AttributionGraph]:
        """Wait for the graphs. It may be called again after any error and goes on from there.

        Args:
            timeout: Seconds to wait for each job; default: the server settings'.

        Raises:
            RemoteError: One of its subclasses; its ``graph`` is this object.
            SiteError: The model cannot be written down.
        """
        with naming(self):
            for phase in PHASES:
                self._jobs.fetch(phase, self._graphs, timeout)
            return [graph.finish(timeout) for graph in self._graphs]
