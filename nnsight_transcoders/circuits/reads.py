"""The values that the frozen model needs, read as the model runs (torch only).

This code runs inside a trace: of a model that is here, or, shipped as text, of one on a server
(``remote/``). Every value is cloned as it passes, since some models go on to change it in place
(Falcon adds attention's output into the MLP's).

Legend: T positions, D d_model, H heads, V vocabulary.
"""

from __future__ import annotations

from typing import Any


def read_run(
    model: Any, parts: dict[str, Any], positions: list[int], prepare: Any = None
) -> dict[str, Any]:
    """One prompt's values, by the names of ``collect.Run``'s fields, each layer's in a list.

    Args:
        model: An nnsight model, inside a trace.
        parts: The model's parts as plain data (``collect.run_parts``).
        positions: Where the logits are kept.
        prepare: Called with the embedding's output as soon as it is there: when a module is first
            called for its values alone, the model has to be running.
    """
    token = model.get(parts["embed"]).output.clone()
    if prepare is not None:
        prepare(token)
    n_positions = token.shape[1]
    position = None
    if parts["position_embed"] is not None:
        position = model.get(parts["position_embed"]).output.clone().reshape(n_positions, -1)
    names = ("resid", "pattern", "attended", "mid", "mlp_in", "mlp_out", "mlp_post")
    values: dict[str, Any] = {name: [] for name in names}
    for layer in parts["layers"]:
        _read_attention(model, layer, values)
        _read_mlp(model, layer, values, n_positions, parts["parallel"])
    values["final"] = model.get(parts["final_norm"]).input.clone()[0]
    values["logits"] = model.get(parts["unembed"]).output[0, positions].clone()
    values["probabilities"] = model.output.logits[0, positions].float().softmax(-1)
    # Where nothing else is added to the token embedding, the block's input is the token's
    # whole contribution: it includes what the model does to it (Gemma's scale, Bloom's norm).
    values["embedding"] = values["resid"][0] if position is None else token[0]
    values["position_embedding"] = position
    return values


def _read_attention(model: Any, layer: dict[str, Any], values: dict[str, Any]) -> None:
    values["resid"].append(model.get(layer["block"]).input.clone()[0])
    values["attended"].append(model.get(layer["out_proj"]).output.clone()[0])
    outputs = model.get(layer["attention"]).output
    pattern = outputs[1] if isinstance(outputs, tuple) and len(outputs) > 1 else None
    values["pattern"].append(None if pattern is None else pattern[0].clone())


def _read_mlp(
    model: Any, layer: dict[str, Any], values: dict[str, Any], n_positions: int, parallel: bool
) -> None:
    mid = values["resid"][-1] if parallel else None
    if not parallel and layer["mlp_norm"] is not None:
        mid = model.get(layer["mlp_norm"]).input.clone().reshape(n_positions, -1)
    mlp_in = model.get(layer["mlp_in"]).input.clone().reshape(n_positions, -1)
    values["mid"].append(mlp_in if mid is None else mid)
    values["mlp_in"].append(mlp_in)
    mlp_out = model.get(layer["mlp_out"]).output
    if isinstance(mlp_out, tuple):
        mlp_out = mlp_out[0]
    mlp_out = mlp_out.clone().reshape(n_positions, -1)
    values["mlp_out"].append(mlp_out)
    if layer["mlp_post_norm"] is not None:
        post = model.get(layer["mlp_post_norm"]).output.clone()
        values["mlp_post"].append(post.reshape(n_positions, -1))
    else:
        values["mlp_post"].append(mlp_out)
