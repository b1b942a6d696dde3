"""SAELens itself opens what we write, and we open what it writes (docs/testing.md, "peers")."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nnsight_transcoders.hub.saelens import save_saelens
from nnsight_transcoders.sets import TranscoderSet

from .checkpoints import make_set, random

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "batchtopk"])
@pytest.mark.parametrize("skip", [False, True])
def test_saelens_reads_and_writes(activation: str, skip: bool, tmp_path: Path) -> None:
    SAE = pytest.importorskip("sae_lens").SAE
    made = make_set(activation=activation, skip=skip, input_site="N0", base_model="gpt2")
    save_saelens(made, tmp_path / "ours")
    sae = SAE.load_from_disk(tmp_path / "ours" / "layer_1", device="cpu")
    x = random(5, 7, 6)
    with torch.no_grad():
        torch.testing.assert_close(sae(x), made[1](x))
    assert sae.cfg.metadata.hook_name == "blocks.1.ln2.hook_normalized"
    sae.save_model(tmp_path / "theirs")
    back = TranscoderSet.from_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(back[1](x), made[1](x))
    assert (back.config(1).input_site, back.config(1).base_model) == ("N0", "gpt2")
