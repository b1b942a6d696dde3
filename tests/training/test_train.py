"""``train`` from end to end: every kind, errors, the command line, the model left as it was."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from planted import CONTEXT, planted_model, rows
from typer.testing import CliRunner

from nnsight_transcoders import TrainConfig, TranscoderSet, attach, attribute, train, verify
from nnsight_transcoders.cli import app
from nnsight_transcoders.errors import ConfigError, InputError, TrainingError
from nnsight_transcoders.training.config import FREE_KEYS
from nnsight_transcoders.training.memory import estimate
from nnsight_transcoders.training.run_file import read_run_file
from nnsight_transcoders.training.step import learning_rate, sparsity_weight

SMALL: dict[str, Any] = {
    "context": 16,
    "pack": False,
    "d_transcoder": 48,
    "k": 4,
    "batch_size": 64,
    "buffer_size": 256,
    "rows_per_forward": 8,
    "n_tokens": 64 * 12,
    "lr": 0.01,
    "log_every": 4,
    "dead_after": 256,
}
DATA = [torch.randint(3, 97, (16,), generator=torch.Generator().manual_seed(i)) for i in range(40)]


@pytest.fixture(scope="module")
def llama() -> Any:
    return zoo.nnsight_model("llama")


KINDS: list[dict[str, Any]] = [
    {"activation": "relu"},
    {"activation": "relu", "sparsity": "tanh", "decoder_norm": "unit"},
    {"activation": "jumprelu", "objective": "mse"},
    {"activation": "topk", "skip": True, "autocast": "bfloat16"},
    {"activation": "batchtopk", "optimizer": "AdamW", "optimizer_options": {"weight_decay": 0.1}},
    {"activation": "grouptopk", "n_groups": 4, "k": 2, "optimizer": "SGD"},
    {"activation": "batchtopk", "cross_layer": True},
    {"activation": "jumprelu", "cross_layer": True, "sparsity": "tanh", "skip": True},
    {"input_site": "O", "output_site": "O"},
    {"input_site": "R", "output_site": "O'", "decoder_start": "tied", "buffer_dtype": "bfloat16"},
    {"input_site": "N0", "layers": [1], "dtype": "float16"},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_every_kind_is_trained_saved_and_attached(
    llama: Any, tmp_path: Path, kind: dict[str, Any]
) -> None:
    trained = train(llama, DATA, SMALL | kind, out=tmp_path / "run", verbose=False)
    opened = TranscoderSet.from_pretrained(tmp_path / "run")
    assert opened.layers == trained.layers == tuple(kind.get("layers", (0, 1, 2)))
    config = opened.config(1)
    for key in set(kind) & {f.name for f in dataclasses.fields(config)} - {"k"}:
        assert getattr(config, key) == kind[key], key
    for layer in opened.layers:
        for name, weight in trained[layer].state_dict().items():
            assert torch.equal(weight, opened[layer].state_dict()[name]), name
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert lines[-1]["loss"] < lines[0]["loss"] * 1.5
    assert all(math.isfinite(value) for line in lines for value in line.values())
    replaced = attach(llama, opened)
    with replaced.trace(DATA[0][None]):
        features = replaced.transcoders[1].features.output.save()
    assert features.shape == (1, 16, 48)
    assert not features[:, 0].any()  # the leading position is the MLP's own


@pytest.mark.parametrize("kind", KINDS[:-2], ids=lambda kind: "-".join(map(str, kind.values())))
def test_the_log_says_what_the_finished_transcoders_do(llama: Any, kind: dict[str, Any]) -> None:
    """Scales are folded in exactly: a learning rate of nearly nothing leaves the step's FVU."""
    from nnsight_transcoders import resolve_sites
    from nnsight_transcoders.training.stream import SiteReader, kept_positions

    settings = SMALL | kind | {"lr": 1e-9, "batch_size": 120, "buffer_size": 120, "n_tokens": 120}
    settings |= {"decoder_start": "random", "optimizer": "Adam", "optimizer_options": {}}
    settings |= {"autocast": None, "log_every": 1}
    data = DATA[:8]
    out: list[dict[str, float]] = []
    trained = train(llama, data, settings, verbose=False)
    c = trained.config(0)
    reader = SiteReader(llama, resolve_sites(llama), trained.layers, c.input_site, c.output_site)
    ids = torch.stack(data)
    (values,) = reader([(ids, kept_positions(ids, [16] * 8, 1, frozenset({0, 1, 2})))])
    active = {n: trained[n].encode(values[n][0]) for n in trained.layers}
    fvu = []
    for n in trained.layers:
        error = values[n][1] - trained.decode(n, active, values[n][0])
        spread = values[n][1] - values[n][1].mean(0)
        fvu.append(float(error.square().sum() / spread.square().sum()))
    out = _log_of(llama, data, settings)
    for n, expected in zip(trained.layers, fvu, strict=True):
        assert out[0][f"layer_{n}/fvu"] == pytest.approx(expected, rel=2e-3)


def _log_of(model: Any, data: Any, settings: dict[str, Any]) -> list[dict[str, float]]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        train(model, data, settings, out=folder, verbose=False)
        lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_seed_gives_one_set_and_another_seed_another(llama: Any) -> None:
    sets = [train(llama, DATA, SMALL | {"seed": seed}, verbose=False) for seed in (1, 1, 2)]
    assert torch.equal(sets[0][0].W_enc, sets[1][0].W_enc)
    assert not torch.equal(sets[0][0].W_enc, sets[2][0].W_enc)


def test_layers_do_not_depend_on_which_others_are_trained(llama: Any) -> None:
    alone = train(llama, DATA, SMALL | {"layers": [1]}, verbose=False)
    among = train(llama, DATA, SMALL, verbose=False)
    assert torch.equal(alone[1].W_enc, among[1].W_enc)


def test_the_model_stays_as_it_was(llama: Any) -> None:
    module = llama._module
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    wanted = [p.requires_grad for p in module.parameters()]
    train(llama, DATA, SMALL | {"evaluate_every": 6}, verbose=False)
    assert all(torch.equal(w, before[n]) for n, w in module.state_dict().items())
    assert [p.requires_grad for p in module.parameters()] == wanted
    assert not [m for m in module.modules() if m._forward_hooks]


def test_the_cache_changes_nothing(llama: Any, tmp_path: Path) -> None:
    plain = train(llama, DATA, SMALL, verbose=False)
    for _ in range(2):
        cached = train(llama, DATA, SMALL | {"cache": str(tmp_path)}, verbose=False)
        assert torch.equal(cached[2].W_dec, plain[2].W_dec)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3


# -- further training ----------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu", "jumprelu"])
@pytest.mark.parametrize("objective", ["kl", "ce"])
def test_end_to_end_training_lowers_the_models_own_loss(activation: str, objective: str) -> None:
    model, *_ = planted_model(n_layers=2)
    data = rows(64)
    settings = SMALL | {"context": CONTEXT, "activation": activation, "sparsity_weight": 1e-3}
    start = train(model, data, settings | {"batch_size": 256, "n_tokens": 2560}, verbose=False)
    further = settings | {"objective": objective, "lr": 3e-3, "batch_size": 512}
    further |= {"n_tokens": 512 * 25, "evaluate_every": 25}
    before = {n: copy.deepcopy(start[n].state_dict()) for n in start.layers}
    tuned = train(model, data, further, start=start, verbose=False)
    for n, state in before.items():
        assert all(torch.equal(weight, state[k]) for k, weight in start[n].state_dict().items())
    # This model knows nothing of its random text, so a lower CE is a matter of the rows seen.
    ids = torch.stack(rows(16, seed=5) if objective == "kl" else data)
    was, now = (_loss(model, transcoders, ids, objective) for transcoders in (start, tuned))
    assert now < 0.95 * was


def _loss(model: Any, transcoders: TranscoderSet, ids: torch.Tensor, objective: str) -> float:
    replaced = attach(model, transcoders)
    with torch.no_grad():
        with replaced.trace(ids):
            new = replaced.output.logits.save()
        old = model._module(ids).logits
    if objective == "ce":
        return float(torch.nn.functional.cross_entropy(new[:, :-1].mT, ids[:, 1:]))
    old, new = old.log_softmax(-1), new.log_softmax(-1)
    return float((old.exp() * (old - new)).sum(-1).mean())


def test_a_set_is_trained_further(llama: Any) -> None:
    start = train(llama, DATA, SMALL | {"activation": "batchtopk"}, verbose=False)
    settings = SMALL | {"lr": 1e-9, "activation": "relu"}
    further = train(llama, DATA, settings, start=start, verbose=False)
    assert further.config(0).activation == "batchtopk"  # the set's own
    for name, weight in further[0].named_parameters():
        if "threshold" not in name:  # it follows the batches whatever the learning rate
            before = start[0].get_parameter(name)
            torch.testing.assert_close(weight, before, rtol=1e-3, atol=1e-4)


# -- autoencoders --------------------------------------------------------------------------------


def test_an_autoencoder_reads_and_writes_the_output(llama: Any) -> None:
    settings = SMALL | {"input_site": "O", "output_site": "O", "layers": [1], "k": 16}
    trained = train(llama, DATA, settings, verbose=False)
    assert trained.config(1).is_autoencoder
    seen: list[torch.Tensor] = []
    mlp = llama._module.model.layers[1].mlp
    handle = mlp.register_forward_hook(lambda _, __, out: seen.append(out.clone()))
    ids = torch.stack(DATA[:2])
    with torch.no_grad():
        llama._module(ids)
        handle.remove()
        for mode in ("replace", "replace+error", "observe"):
            replaced = attach(llama, trained, mode=mode)
            with replaced.trace(ids):
                out = replaced.model.layers[1].mlp.output.save()
            expected = seen[0].clone()
            if mode == "replace":
                expected[:, 1:] = trained[1](seen[0])[:, 1:]
            torch.testing.assert_close(out, expected)


def test_circuits_refuse_autoencoders_and_verify_takes_them(llama: Any) -> None:
    settings = SMALL | {"input_site": "O", "output_site": "O"}
    trained = train(llama, DATA, settings, verbose=False)
    with pytest.raises(InputError, match="layer 0's is a sparse autoencoder"):
        attribute(llama, trained, DATA[0])
    report = verify(llama, trained, DATA[:4])
    assert [fit.layer for fit in report.layers] == [0, 1, 2]
    with pytest.raises(ConfigError, match="'O' is an output site: only a sparse autoencoder"):
        trained.config(0).replace(output_site="O'")


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rat": 1}, "unknown training config key 'learning_rat'"),
        ({"n_token": 1}, "'n_token'; did you mean 'n_tokens'"),
        ({"activation": "gelu"}, "activation must be one of"),
        ({"k": 0}, "k must be a positive integer, got 0"),
        ({"k": 49}, "1 <= k <= 48"),
        ({"lr": "fast"}, "lr must be a number above 0"),
        ({"lr": math.nan}, "lr must be a number above 0"),
        ({"warmup": 2.0}, "warmup must be between 0 and 1"),
        ({"skip": 1}, "skip must be true or false"),
        ({"layers": []}, "layers must be a list"),
        ({"layers": [0, 0]}, "layers must be a list"),
        ({"dtype": "float31"}, "'float31' is not a floating-point torch dtype"),
        ({"n_tokens": 32}, "n_tokens=32 is less than one batch"),
        ({"buffer_size": 32}, "buffer_size=32 is less than batch_size"),
        ({"leading_positions": 16}, "leaves nothing of a context of 16"),
        ({"activation": "grouptopk"}, "needs n_groups"),
        ({"sparsity": "l0"}, "works through JumpReLU's thresholds"),
        ({"cross_layer": True, "input_site": "O"}, "cannot read the site that it writes"),
        ({"input_site": "O", "skip": True}, "would learn the identity"),
        ({"decoder_norm": "unit", "decoder_start": "zero"}, "cannot start at zero"),
        ({"optimizer": "Sophia"}, "torch.optim has no optimiser 'Sophia'"),
        ({"optimizer_options": {"beta": 1}}, "optimizer 'Adam' cannot be made"),
        ({"log_to": ["mlflow"]}, "log_to must be a list of tensorboard, wandb, trackio"),
        ({"objective": "kl"}, "needs a set to start from"),
        ({"context": 65}, "context=65, but the model takes 64"),
    ],
)
def test_bad_settings(llama: Any, tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(llama, DATA, SMALL | settings, out=tmp_path / "run", verbose=False)


def test_layers_that_do_not_exist(llama: Any) -> None:
    with pytest.raises(InputError, match="layers 0 to 2; there is no layer 3, 7"):
        train(llama, DATA, SMALL | {"layers": [1, 3, 7]}, verbose=False)


def test_too_little_memory_is_known_beforehand(llama: Any) -> None:
    with pytest.raises(ConfigError, match=r"needs about .* GB .*cpu has .* GB free: lower d_trans"):
        train(llama, DATA, SMALL | {"d_transcoder": 10**9}, verbose=False)
    with pytest.raises(ConfigError, match="buffer .*lower d_transcoder, buffer_size"):
        train(llama, DATA, SMALL | {"buffer_size": 10**12, "n_tokens": 10**12}, verbose=False)


def test_the_estimate_of_memory_counts_what_is_allocated(llama: Any) -> None:
    trained = train(llama, DATA, SMALL, verbose=False)
    shapes = {n: trained.config(n) for n in trained.layers}
    parts = estimate(TrainConfig(**SMALL), shapes)
    weights = sum(p.numel() for n in trained.layers for p in trained[n].parameters())
    assert parts["weights and optimiser"] == pytest.approx(weights * 4 * 4, rel=0.05)
    assert parts["buffer"] == 3 * 2 * 256 * 32 * 4


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    model, *_ = planted_model()
    settings = SMALL | {"context": CONTEXT, "checkpoint_every": 1, "n_tokens": 64 * 400}
    settings |= {"lr": 1e30, "warmup": 0.01, "clip_norm": None, "decay": "constant"}
    with pytest.raises(TrainingError, match=r"the loss of layer\(s\) 0 became .* at step"):
        train(model, rows(50), settings, out=tmp_path / "run", verbose=False)
    assert list((tmp_path / "run/checkpoint").glob("step_*"))


def test_a_model_in_training_mode(llama: Any) -> None:
    llama._module.train()
    try:
        with pytest.raises(InputError, match="training mode"):
            train(llama, DATA, SMALL, verbose=False)
    finally:
        llama._module.eval()


# -- schedules -----------------------------------------------------------------------------------


def test_the_learning_rate_rises_stays_and_falls() -> None:
    base = TrainConfig(n_tokens=100 * 64, batch_size=64, buffer_size=64, warmup=0.1, final_lr=0.1)
    cosine = [learning_rate(step, base, 2.0) for step in range(100)]
    assert cosine[0] == pytest.approx(0.2)
    assert cosine[9] == cosine[10] == pytest.approx(2.0)
    assert cosine[55] == pytest.approx(1.1)
    assert cosine[10:] == sorted(cosine[10:], reverse=True)
    late = base.replace(decay="linear", decay_start=0.8)
    linear = [learning_rate(step, late, 2.0) for step in range(100)]
    assert set(linear[9:81]) == {2.0}
    assert linear[90] == pytest.approx(1.1)
    constant = base.replace(decay="constant")
    assert learning_rate(99, constant, 2.0) == 2.0


def test_the_penalty_rises() -> None:
    config = TrainConfig(n_tokens=100 * 64, batch_size=64, buffer_size=64, sparsity_weight=1.0)
    assert [sparsity_weight(s, config) for s in (0, 9, 19, 50)] == [0.05, 0.5, 1.0, 1.0]


# -- logs ----------------------------------------------------------------------------------------


def test_tensorboard_gets_every_number(llama: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = SMALL | {"log_to": ["tensorboard"], "evaluate_every": 12}
    train(llama, DATA, settings, out=tmp_path, verbose=False)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    names = set(events.Tags()["scalars"])
    assert {"loss", "fvu", "l0", "dead", "ce_change", "layer_2/fvu", "tokens_per_second"} <= names
    for name in ("loss", "layer_1/l0"):
        got = [(event.step, event.value) for event in events.Scalars(name)]
        assert got == [(line["step"], pytest.approx(line[name])) for line in lines]


@pytest.mark.parametrize("service", ["wandb", "trackio"])
def test_a_service_that_is_not_installed(llama: Any, service: str) -> None:
    import importlib.util

    if importlib.util.find_spec(service):
        pytest.skip(f"{service} is installed")
    with pytest.raises(ConfigError, match=f"needs {service}: pip install {service}"):
        train(llama, DATA, SMALL | {"log_to": [service]}, verbose=False)


@pytest.fixture
def resumed(llama: Any, tmp_path: Path) -> Callable[[str], Path]:
    """Train until the data ends, then go on with more of it; the run's folder."""

    def run(service: str) -> Path:
        settings = SMALL | {"log_to": [service], "log_every": 1, "checkpoint_every": 2}
        out = tmp_path / "project" / "run"
        train(llama, iter(DATA[:20]), settings, out=out, verbose=False)
        train(llama, DATA, settings, out=out, verbose=False)
        return out

    return run


def test_a_resumed_run_is_the_same_run_in_wandb(
    resumed: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run_id = (resumed("wandb") / "wandb_id.txt").read_text()
    runs = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert runs and all(name.endswith(f"-{run_id}") for name in runs)


def test_a_resumed_run_is_the_same_run_in_trackio(resumed: Callable[[str], Path]) -> None:
    trackio = pytest.importorskip("trackio")
    resumed("trackio")
    (run,) = trackio.Api().runs("project")
    assert run.name == "run"


# -- config and command line ---------------------------------------------------------------------


def test_a_config_survives_json() -> None:
    config = TrainConfig(layers=(1, 2), log_to=("tensorboard",), optimizer_options={"eps": 1e-6})
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert set(FREE_KEYS) <= set(config.to_dict())


def test_every_field_is_documented() -> None:
    for field in dataclasses.fields(TrainConfig):
        assert f"        {field.name}: " in (TrainConfig.__doc__ or "") or (
            f"        {field.name}:" in (TrainConfig.__doc__ or "")
        ), field.name


RUN = """
model: builtin
data: builtin
out: run
layers: [1]
d_transcoder: 64
k: 8
lr: 1e-3
n_tokens: 4e3
batch_size: 500
buffer_size: 1000
"""


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path / "run.yaml"


def test_a_run_file_and_settings_over_it(run_file: Path) -> None:
    settings = ["k=4", "optimizer_options.betas=[0.9, 0.98]", "data.path=owner/set", "lr=5e-4"]
    run_file.write_text(RUN.replace("data: builtin", "data: {name: en}"))
    file = read_run_file(run_file, settings)
    assert (file.model, file.out) == ("builtin", "run")
    assert file.data == {"name": "en", "path": "owner/set"}
    assert (file.config.k, file.config.lr, file.config.n_tokens) == (4, 5e-4, 4000)
    assert file.config.optimizer_options == {"betas": [0.9, 0.98]}


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        (RUN + "learning_rate: 1\n", [], "unknown training config key 'learning_rate'"),
        (RUN + "ou: x\n", [], "'ou'; did you mean 'out'"),
        (RUN, ["k"], "key=value, got 'k'"),
        (RUN, ["k.x=1"], "k is no mapping"),
        (RUN, ["k=[1"], "not a YAML value"),
        (RUN, ["model=null"], "must say model"),
        (RUN, ["device=3"], "device cannot be 3"),
        ("- a\n", [], "must hold keys and values"),
        ("a: [", [], "neither YAML nor JSON"),
    ],
)
def test_bad_run_files(run_file: Path, text: str, settings: list[str], message: str) -> None:
    run_file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_run_file(run_file, settings)


def test_the_command_trains_and_verify_takes_the_result(run_file: Path) -> None:
    result = CliRunner().invoke(app, ["train", str(run_file), "activation=batchtopk", "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["out"] == "run"
    assert printed["layers"]["1"]["activation"] == "batchtopk"
    result = CliRunner().invoke(app, ["info", "run"])
    assert "layers=1" in result.stdout
    again = CliRunner().invoke(app, ["train", str(run_file), "activation=batchtopk"])
    assert "saved in run" in again.stdout
    other = CliRunner().invoke(app, ["train", str(run_file)])
    assert other.exit_code == 1
    assert "activation ('batchtopk' there, 'topk' now)" in other.stderr


def test_verify_takes_a_trained_set() -> None:
    from nnsight import TransformersModel

    from nnsight_transcoders import builtin_model_path

    model = TransformersModel(builtin_model_path(), task="text-generation", dispatch=True)
    settings = {"layers": [0], "d_transcoder": 256, "k": 16, "n_tokens": 60_000, "lr": 5e-3}
    settings |= {"batch_size": 1000, "buffer_size": 10_000, "pack": False, "special_tokens": True}
    (fit,) = verify(model, train(model, "builtin", settings, verbose=False)).layers
    assert fit.verdict == "fits"
    assert fit.fvu < 0.2
