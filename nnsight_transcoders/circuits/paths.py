"""Computational paths: the greedy search of the paper, and the graph its paths merge into.

From a target, the components that contribute to it; from each feature, head or skip path among
them, what contributes to that; and so on (Dunefsky, Chlenski, Nanda 2024, section 4.2). Every value
is in the root's units, so paths of any length compare. Contributions are ranked by magnitude:
ranking signed values, as the paper's code does, drops the paths that inhibit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from nnsight_transcoders.errors import InputError

from .contributions import CircuitRun
from .feature_vectors import EXTENDABLE, Contribution, FeatureVector


@dataclass(frozen=True)
class Where:
    """Which contributions a search may use; combine with ``&``, ``|`` and ``~``.

    Each field that is given must match: a collection (a set, list or ``range``) by membership.

    Attributes:
        kinds: Component kinds.
        layers: Their layers.
        positions: The positions they are read at.
        features: Feature numbers; only features can match.
        heads: Heads; only attention can match.
    """

    kinds: Collection[str] | None = None
    layers: Collection[int] | None = None
    positions: Collection[int] | None = None
    features: Collection[int] | None = None
    heads: Collection[int] | None = None
    _test: Callable[[Contribution], bool] | None = field(default=None, repr=False)

    def __call__(self, found: Contribution) -> bool:
        """Whether a contribution matches."""
        if self._test is not None:
            return self._test(found)
        checks = (
            (self.kinds, found.kind, True),
            (self.layers, found.layer, True),
            (self.positions, found.position, True),
            (self.features, found.index, found.kind == "feature"),
            (self.heads, found.index, found.kind == "attention"),
        )
        return all(wanted is None or (fits and value in wanted) for wanted, value, fits in checks)

    def __and__(self, other: Where) -> Where:
        return Where(_test=lambda found: self(found) and other(found))

    def __or__(self, other: Where) -> Where:
        return Where(_test=lambda found: self(found) or other(found))

    def __invert__(self) -> Where:
        return Where(_test=lambda found: not self(found))


#: Which component a contribution is of, whatever it carries: kind, layer, position, index.
Key = tuple[str, int, int, int]

#: What a component is recognised by: a test, or a contribution (compared by its ``Key``).
Pattern = Contribution | Callable[[Contribution], bool]


def key_of(found: Contribution) -> Key:
    """The component that a contribution is of: the same along every path that it lies on."""
    return (found.kind, found.layer, found.position, found.index)


def _fits(pattern: Pattern, step: Contribution) -> bool:
    if isinstance(pattern, Contribution):
        return key_of(pattern) == key_of(step)
    return pattern(step)


@dataclass(frozen=True)
class Path:
    """A path from the root target down to where it was followed.

    Attributes:
        root: The target's name.
        steps: The components, nearest to the root first.
        value: What flows along it, in the root's units: the last step's contribution.
        ended: Whether the last step is one that paths end in (a token, an error, a bias).
    """

    root: str
    steps: tuple[Contribution, ...]

    @property
    def value(self) -> float:
        """See the class."""
        return self.steps[-1].value

    @property
    def ended(self) -> bool:
        """See the class."""
        return self.steps[-1].kind not in EXTENDABLE

    @property
    def capped(self) -> float:
        """``value``, but no larger than what flows through any one feature of the path.

        A stand-in for ablating a feature, which takes away no more than flows through it.
        """
        sizes = [abs(step.value) for step in self.steps if step.kind == "feature"]
        return math.copysign(min([*sizes, abs(self.value)]), self.value)

    def contains(self, part: Path | Pattern | Sequence[Pattern]) -> bool:
        """Whether a component, or a sub-path without gaps, lies on this path.

        Args:
            part: A ``Where`` (or any test), a contribution, another path, or a sequence of tests
                and contributions, nearest to the root first. Values do not matter.

        Raises:
            InputError: An empty sequence.
        """
        wanted = _patterns(part)
        return any(self._fits_at(start, wanted) for start in range(len(self.steps)))

    def avoids(self, part: Path | Pattern | Sequence[Pattern]) -> bool:
        """Whether it does not lie on this path (see ``contains``)."""
        return not self.contains(part)

    def ends_in(self, part: Path | Pattern | Sequence[Pattern]) -> bool:
        """Whether this path's last steps are that component or sub-path (see ``contains``)."""
        wanted = _patterns(part)
        return self._fits_at(len(self.steps) - len(wanted), wanted)

    def _fits_at(self, start: int, wanted: Sequence[Pattern]) -> bool:
        steps = self.steps[start : start + len(wanted)] if start >= 0 else ()
        return len(steps) == len(wanted) and all(map(_fits, wanted, steps))

    def __str__(self) -> str:
        steps = " <- ".join([self.root, *(str(step) for step in self.steps)])
        return f"{self.value:+.4f}  {steps}"


def _patterns(part: Path | Pattern | Sequence[Pattern]) -> Sequence[Pattern]:
    if isinstance(part, Path):
        return part.steps
    if isinstance(part, Contribution) or callable(part):
        return (part,)
    if not len(part):
        raise InputError("an empty sub-path lies on every path: name at least one component")
    return part


def top_paths(
    circuit: CircuitRun,
    target: FeatureVector,
    *,
    depth: int = 3,
    per_node: int = 10,
    beam: int = 50,
    where: Callable[[Contribution], bool] | None = None,
) -> list[Path]:
    """The paths that carry most to a target, found greedily.

    Args:
        circuit: The run.
        target: What to explain.
        depth: Longest path, in components.
        per_node: How many contributions of each node are followed.
        beam: How many paths are kept after each round, by magnitude.
        where: Which contributions may be used at every step (see ``Where``).

    Returns:
        All paths kept in any round, extended or not, largest magnitude first. A path and its
        extensions overlap; those that ``ended`` do not.

    Raises:
        InputError: A limit below 1.
    """
    for name, limit in (("depth", depth), ("per_node", per_node), ("beam", beam)):
        if limit < 1:
            raise InputError(f"{name} must be at least 1, got {limit}")
    kept: list[Path] = []
    frontier: list[tuple[tuple[Contribution, ...], FeatureVector]] = [((), target)]
    for _ in range(depth):
        found = []
        circuit.prepare([vector for _, vector in frontier])
        for steps, vector in frontier:
            usable = [c for c in circuit.contributions(vector) if where is None or where(c)]
            usable.sort(key=lambda c: -abs(c.value))
            found += [((*steps, c), vector) for c in usable[:per_node]]
        found.sort(key=lambda one: -abs(one[0][-1].value))
        found = found[:beam]
        kept += [Path(target.name, steps) for steps, _ in found]
        ends = [(steps, vector) for steps, vector in found if steps[-1].kind in EXTENDABLE]
        vectors = circuit.extend_all([(vector, steps[-1]) for steps, vector in ends])
        frontier = [(steps, vector) for (steps, _), vector in zip(ends, vectors, strict=True)]
    return sorted(kept, key=lambda path: -abs(path.value))


@dataclass(frozen=True)
class PathEdge:
    """Two components that paths join, and how much flows between them in the root's units."""

    source: Contribution | None
    target: Contribution | None
    value: float


@dataclass(frozen=True)
class PathGraph:
    """Paths merged where they share their beginnings: the paper's computational subgraph.

    Attributes:
        root: The target's name.
        total: What all of the root's contributions sum to.
        edges: From component to component; ``target`` None is the root, ``source`` None is what
            was not followed there, so that every followed node's edges sum to its value.
    """

    root: str
    total: float
    edges: tuple[PathEdge, ...]

    def into(self, node: Contribution | None) -> list[PathEdge]:
        """Edges into a node (None: the root), largest magnitude first."""
        found = [edge for edge in self.edges if edge.target == node]
        return sorted(found, key=lambda edge: -abs(edge.value))

    def __str__(self) -> str:
        lines = [f"{self.total:+.4f}  {self.root}"]

        def walk(node: Contribution | None, indent: int) -> None:
            for edge in self.into(node):
                name = "(not followed)" if edge.source is None else str(edge.source)
                lines.append(f"{'  ' * indent}{edge.value:+.4f}  {name}")
                if edge.source is not None:
                    walk(edge.source, indent + 1)

        walk(None, 1)
        return "\n".join(lines)


def merge_paths(circuit: CircuitRun, target: FeatureVector, paths: Sequence[Path]) -> PathGraph:
    """Merge paths into a graph that closes at every node it follows.

    A component reached along two different paths is two nodes, since what flows through it differs.

    Args:
        circuit: The run.
        target: The target the paths were found for.
        paths: From ``top_paths``.
    """
    total = circuit.total(target)
    children: dict[tuple[Contribution, ...], dict[Contribution, None]] = {(): {}}
    for path in paths:
        for i, step in enumerate(path.steps):
            children.setdefault(path.steps[:i], {})[step] = None
    edges = []
    for steps, found in children.items():
        node = steps[-1] if steps else None
        reached = total if node is None else node.value
        edges += [PathEdge(source, node, source.value) for source in found]
        edges.append(PathEdge(None, node, reached - sum(source.value for source in found)))
    return PathGraph(target.name, total, tuple(edges))
