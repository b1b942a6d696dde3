"""Values at transcoder sites of a model that is here or on a server, batch by batch.

The one place where everything that needs a run's values reads them: client-side features,
``verify`` of a remote set, activations for training. What travels is the values asked for; the
transcoders stay where they are.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import LayerSites
from .circuits.collect import token_ids_of
from .circuits.invariant_job import called_norms
from .errors import InputError, JobLostError, ServerUnreachableError, SiteError
from .models import hf_module
from .norms import TOLERANCE, NormSpec, spec_of_probe
from .remote.calls import Job, call, submit
from .remote.server import Remote, RemoteServer, remote_server
from .remote.weights import epsilons
from .sets import TranscoderSet
from .site_reads import read_values
from .sites import Sites, resolve_sites
from .transcoder import InputSite, OutputSite

logger = logging.getLogger(__name__)

#: A layer and one of its sites.
Where = tuple[int, InputSite | OutputSite]
#: A batch: token ids ``(n, T)``, perhaps with a mask of the positions that are wanted.
Batch = Tensor | tuple[Tensor, Tensor]

_ORDER = {"R": 0, "N0": 1, "N1": 2, "O": 3, "O'": 4}


def site_values(
    model: Any,
    wanted: Sequence[Where],
    token_ids: Tensor,
    kept: Tensor | None = None,
    *,
    sites: Sites | None = None,
    remote: Remote | None = None,
    dtype: str | None = None,
) -> dict[Where, Tensor]:
    """Values at some sites of some layers, from one forward pass, which stops after the last.

    Args:
        model: An nnsight model; for a remote one, its module tree is enough.
        wanted: ``(layer, site)`` pairs, with sites R, N0, N1, O and O' (docs/concepts.md).
        token_ids: ``(n, T)``. Shorter rows may be padded on the right, which changes nothing before
            the padding.
        kept: ``(n, T)`` True where values are wanted: nothing else is sent.
        sites: The model's sites, where they have to be given by hand.
        remote: Run the model on a server: True, an address, or a ``RemoteServer``.
        dtype: Of the values, ``"bfloat16"`` say; default: the model's.

    Returns:
        For each pair ``(n, T, D)``, or ``(m, D)`` at the kept positions; of a remote model, on the
        CPU.

    Raises:
        InputError: A layer or site that does not exist.
        SiteError: Site N0 where there is no norm before the MLP.
        RemoteError: The server, or the job there, failed.
    """
    batch = token_ids if kept is None else (token_ids, kept)
    (found,) = stream_site_values(model, wanted, [batch], sites=sites, remote=remote, dtype=dtype)
    return found


def stream_site_values(
    model: Any,
    wanted: Sequence[Where],
    batches: Iterable[Batch],
    *,
    sites: Sites | None = None,
    remote: Remote | None = None,
    dtype: str | None = None,
    ahead: int = 2,
    attempts: int = 4,
) -> Iterator[dict[Where, Tensor]]:
    """``site_values`` of many batches, in order.

    Remote requests are sent ahead, so that the server computes while the client works on what it
    has. A batch that was lost (the server was restarted, the connection cut) is asked for again:
    reading changes nothing there.

    Args:
        model: See ``site_values``.
        wanted: See ``site_values``.
        batches: Token ids ``(n, T)``, or ``(token ids, kept)``.
        sites: See ``site_values``.
        remote: See ``site_values``.
        dtype: See ``site_values``.
        ahead: Requests under way at once.
        attempts: Times that a batch is asked for before its error is passed on.
    """
    server = remote_server(remote)
    module = hf_module(model, weights=server is None)
    sites = sites or resolve_sites(module)
    pairs, reads = _ordered(module, sites, wanted)
    dtype = dtype or (server.dtype if server is not None else None)

    def send(batch: Batch) -> Job:
        ids, kept = batch if isinstance(batch, tuple) else (batch, None)
        shaped = [{**read, "shape": tuple(ids.shape)} for read in reads]
        return submit(model, ids, read_values, shaped, kept, dtype, remote=server, stop=True)

    under_way: deque[tuple[Batch, Job]] = deque()
    for batch in batches:
        under_way.append((batch, send(batch)))
        if server is None or len(under_way) > max(1, ahead) - 1:
            yield dict(zip(pairs, _result(*under_way.popleft(), send, attempts), strict=True))
    while under_way:
        yield dict(zip(pairs, _result(*under_way.popleft(), send, attempts), strict=True))


def read_features(
    model: Any,
    transcoders: TranscoderSet,
    prompt: str | Sequence[int] | Tensor,
    layers: Sequence[int] | None = None,
    *,
    sites: Sites | None = None,
    remote: Remote | None = None,
) -> dict[int, Tensor]:
    """Feature activations of a prompt, computed here from the values at the input sites.

    The way to read features of a remote model whose transcoders are too large to send: a layer's
    values come back, ``T`` times d_model numbers, and nothing of the set goes up.

    Args:
        model: An nnsight model; for a remote one, its module tree is enough.
        transcoders: A set that fits it.
        prompt: Text, or token ids ``(T,)``.
        layers: Which of its layers (default: all).
        sites: The model's sites, where they have to be given by hand.
        remote: Run the model on a server: True, an address, or a ``RemoteServer``.

    Returns:
        Layer -> ``(T, d_transcoder)``; zero at leading positions that the set leaves out.
    """
    module = hf_module(model, weights=remote_server(remote) is None)
    sites = sites or resolve_sites(module)
    transcoders.check_model(sites.d_model, sites.n_layers, type(module).__name__)
    chosen = list(transcoders.layers if layers is None else layers)
    ids = token_ids_of(model, prompt, sites)
    # Where features are chosen over all layers together, all have to be read.
    read = chosen if transcoders.joint_k is None else transcoders.layers
    wanted: list[Where] = [(layer, transcoders.config(layer).input_site) for layer in read]
    values = site_values(model, wanted, ids[None], sites=sites, remote=remote)
    found = transcoders.encode({layer: values[layer, site][0] for layer, site in wanted})
    return {layer: found[layer] for layer in chosen}


def _result(batch: Batch, job: Job, send: Any, attempts: int) -> list[Tensor]:
    for attempt in range(attempts):
        try:
            return job.result()
        except (JobLostError, ServerUnreachableError) as error:
            if attempt == attempts - 1:
                raise
            logger.info("asking again for a batch (%d of %d): %s", attempt + 2, attempts, error)
            job = send(batch)
    raise AssertionError("attempts is at least 1")


def site_reads(
    model: Any, sites: Sites, wanted: Sequence[Where], shape: Sequence[int]
) -> tuple[list[Where], list[dict[str, Any]]]:
    """What ``site_reads.read_values`` is told of some sites, for token ids of a shape ``(n, T)``:
    the pairs in the order in which the model comes by, and their reads."""
    pairs, reads = _ordered(hf_module(model, weights=False), sites, wanted)
    return pairs, [{**read, "shape": tuple(shape)} for read in reads]


def _ordered(
    module: nn.Module, sites: Sites, wanted: Sequence[Where]
) -> tuple[list[Where], list[Mapping[str, Any]]]:
    pairs = sorted(dict.fromkeys(wanted), key=lambda pair: (pair[0], _ORDER.get(pair[1], 9)))
    return pairs, [_read(module, sites, *pair) for pair in pairs]


def output_path(sites: Sites, layer: int, site: str) -> str:
    """The module whose output is the value at an output site."""
    here = sites.layers[layer]
    return (here.mlp_post_norm if site == "O'" else None) or here.mlp_out


def _read(module: nn.Module, sites: Sites, layer: int, site: str) -> Mapping[str, Any]:
    """What ``site_reads.read_values`` is told of a site."""
    if not 0 <= layer < sites.n_layers:
        raise InputError(f"the model has layers 0 to {sites.n_layers - 1}, not {layer}")
    here = sites.layers[layer]
    places = {
        "R": (_residual(here, sites.parallel), True),
        "N0": (_residual(here, sites.parallel), True),
        "N1": (here.mlp_in, True),
        "O": (here.mlp_out, False),
        "O'": (here.mlp_post_norm or here.mlp_out, False),
    }
    if site not in places:
        raise InputError(f"unknown site {site!r}; known: {', '.join(places)}")
    path, of_input = places[site]
    norm = norm_to_probe(module, sites, layer) if site == "N0" else None
    return {"path": path, "input": of_input, "norm": norm}


def remote_norm(model: Any, sites: Sites, layer: int, server: RemoteServer) -> NormSpec:
    """The norm before a layer's MLP of a remote model.

    Raises:
        SiteError: There is none, or it is neither a LayerNorm nor an RMSNorm.
    """
    norm = norm_to_probe(hf_module(model, weights=False), sites, layer)
    ids = torch.zeros(1, 1, dtype=torch.long)
    found = call(model, ids, called_norms, sites.embed, [norm], remote=server, stop=True)[0]
    return spec_of_probe(norm["path"], found, norm["limit"])


def norm_to_probe(module: nn.Module, sites: Sites, layer: int) -> dict[str, Any]:
    """What ``probe_norm`` is told of the norm before a layer's MLP.

    Raises:
        SiteError: There is none.
    """
    path = sites.layers[layer].mlp_norm
    if path is None:
        raise SiteError(f"layer {layer} has no norm before its MLP, so no site N0")
    dtype = next(module.parameters()).dtype
    eps = epsilons(module.get_submodule(path))
    return {"path": path, "width": sites.d_model, "eps": eps, "limit": TOLERANCE[dtype]}


def _residual(here: LayerSites, parallel: bool) -> str:
    if parallel:
        return here.block
    return here.mlp_norm or here.mlp_in
