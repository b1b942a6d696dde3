"""A feature's summary says what it should, and the blind protocol hides what it should."""

from __future__ import annotations

import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
from setups import IDS, model, transcoders

from nnsight_transcoders.circuits.blind import BlindStudy
from nnsight_transcoders.circuits.contributions import CircuitRun
from nnsight_transcoders.circuits.paths import Where
from nnsight_transcoders.circuits.summary import FeatureSummary, feature_summary
from nnsight_transcoders.circuits.weights import de_embeddings, logit_effects
from nnsight_transcoders.errors import InputError

OTHER = (1, 9, 8, 30, 31)


@cache
def circuit() -> CircuitRun:
    return CircuitRun.collect(model("gpt2"), transcoders("gpt2", "per-layer"), IDS)


@cache
def feature(layer: int = 2) -> tuple[int, int, int]:
    """Layer, number and position of an active feature."""
    active = circuit().active.layers[layer]
    return layer, int(active.index[-1]), int(active.position[-1])


def test_a_summary_on_a_run() -> None:
    layer, index, position = feature()
    args = (model("gpt2"), transcoders("gpt2", "per-layer"), layer, index)
    found = feature_summary(
        *args, circuit=circuit(), position=position, statistics={"fires on": "0.4 %"}, top=3
    )
    target = circuit().feature(layer, index, position)
    strongest = max(abs(c.value) for c in circuit().contributions(target))
    assert abs(found.paths[0].value) == pytest.approx(strongest, rel=1e-6)
    effects = logit_effects(*args[:3], [index])[0]
    assert found.top_logits[0] == (f"w{effects.argmax()}", pytest.approx(float(effects.max())))
    assert found.bottom_logits[0][1] == pytest.approx(float(effects.min()))
    reads = de_embeddings(*args[:3], [index])[0]
    assert [v for _, v in found.de_embedding] == pytest.approx(reads.topk(3).values.tolist())
    text = str(found)
    for part in (f"Feature {index} of layer 2", "paths into it", "raises", "fires on: 0.4 %"):
        assert part in text


def test_a_summary_without_a_run_and_its_errors() -> None:
    layer, index, _ = feature()
    args = (model("gpt2"), transcoders("gpt2", "per-layer"))
    found = feature_summary(*args, layer, index)
    assert found.position is None
    assert "paths" not in str(found)
    with pytest.raises(InputError, match="layers 0, 1, 2 have transcoders, not 7"):
        feature_summary(*args, 7, index)
    with pytest.raises(InputError, match="features 0 to 23"):
        feature_summary(*args, layer, 24)
    with pytest.raises(InputError, match=r"pass circuit=CircuitRun.collect"):
        feature_summary(*args, layer, index, position=3)
    silent = set(range(24)) - set(circuit().active.layers[layer].index.tolist())
    if silent:
        with pytest.raises(InputError, match="take another prompt"):
            feature_summary(*args, layer, silent.pop(), circuit=circuit())


class Tags(HTMLParser):
    """Every element, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    bad = "</code><script>alert(1)</script><img src=//x>"
    ranked = ((bad, 1.0),)
    found = FeatureSummary(1, 2, 0, 0.5, (bad, "\ud800"), (), ranked, ranked, ranked, {bad: bad})
    page = found.to_html(tmp_path / "page.html")
    parsed = Tags(page)
    assert not {"script", "img", "link", "iframe"} & {tag for tag, _ in parsed.tags}
    assert not any({"src", "href"} & attrs.keys() for _, attrs in parsed.tags)
    assert parsed.text.count("alert(1)") == 6
    assert "default-src 'none'" in page
    assert (tmp_path / "page.html").exists()
    frame = Tags(found._repr_html_())
    assert [tag for tag, _ in frame.tags] == ["iframe"]
    assert frame.tags[0][1]["srcdoc"] == page


# -- the blind protocol --------------------------------------------------------------------------


def study(restricted: bool = False, **options: object) -> BlindStudy:
    layer, index, _ = feature()
    return BlindStudy(
        model("gpt2"),
        transcoders("gpt2", "per-layer"),
        [IDS, OTHER],
        layer,
        index,
        restricted=restricted,
        **options,  # type: ignore[arg-type]
    )


def test_a_study_shows_positions_and_no_tokens() -> None:
    blind, (_, _, position) = study(), feature()
    assert len(blind) == 2
    assert blind.activations(0)[position] > 0
    terms = blind.contributions(0, position)
    target = circuit().feature(*feature())
    assert sum(t.value for t in terms) == pytest.approx(circuit().total(target), rel=1e-3)
    assert [abs(t.value) for t in terms] == sorted((abs(t.value) for t in terms), reverse=True)
    paths = blind.paths(0, position, depth=2)
    shown = "".join(map(str, [blind, *terms, *paths, *blind.log]))
    assert not re.search(r"\bw\d+\b", shown)
    # What does not depend on the input may name tokens of the vocabulary.
    raised, lowered = blind.logit_effects()
    assert raised[0][1] > 0 > lowered[0][1]
    assert len(blind.de_embedding(0, 1, top=4)) == 4


def test_the_hypothesis_comes_first_and_the_log_has_everything() -> None:
    blind, (_, index, position) = study(corpus=[OTHER, IDS]), feature()
    blind.activations(1)
    with pytest.raises(InputError, match="write the hypothesis down first"):
        blind.reveal()
    with pytest.raises(InputError, match="empty"):
        blind.hypothesis = "  "
    blind.paths(0, position)
    blind.hypothesis = "fires on w12"
    assert blind.hypothesis == "fires on w12"
    shown = blind.reveal(top=1)
    assert shown.prompts[0].tokens == tuple("<bos>" if i == 1 else f"w{i}" for i in IDS)
    assert shown.prompts[0].activations[position] == pytest.approx(
        float(circuit().active.layers[2].activation[-1])
    )
    assert len(shown.examples) == 1
    assert shown.examples[0].peak == max(p.peak for p in shown.prompts)
    assert f"w12[{shown.prompts[0].activations[position]:.2f}]" in str(shown)
    with pytest.raises(InputError, match="can no longer be changed"):
        blind.hypothesis = "I knew it"
    assert [str(a) for a in blind.log] == [
        f"activations(prompt 1, layer 2, feature {index})",
        "reveal(top 10) refused",
        f"paths(prompt 0, position {position})",
        "hypothesis(fires on w12)",
        "reveal(top 1)",
        "hypothesis(I knew it) refused",
    ]


def test_a_restricted_study_says_nothing_of_layer_0_on_the_prompts() -> None:
    first, (_, _, position) = Where(kinds={"feature"}, layers={0}), feature()
    free, blind = study(), study(restricted=True)
    assert any(first(c) for c in free.contributions(0, position))
    assert not any(first(c) for c in blind.contributions(0, position))
    assert any(p.contains(first) for p in free.paths(0, position))
    found = blind.paths(0, position, where=~Where(kinds={"bias"}))
    assert found
    assert all(p.avoids(first) and p.avoids(Where(kinds={"bias"})) for p in found)
    with pytest.raises(InputError, match="does not show what layer-0 features do"):
        blind.activations(0, layer=0, index=3)
    assert blind.log[-1].refused
    assert blind.de_embedding(0, 3)
    with pytest.raises(InputError, match="cannot be about a layer-0 feature"):
        BlindStudy(model("gpt2"), transcoders("gpt2", "per-layer"), [IDS], 0, 3, restricted=True)


def test_a_study_needs_prompts() -> None:
    args = (model("gpt2"), transcoders("gpt2", "per-layer"))
    for prompts in ([], "w3 w4"):
        with pytest.raises(InputError, match="at least one prompt"):
            BlindStudy(*args, prompts, 1, 0)
    with pytest.raises(InputError, match="prompts 0 to 1, not 2"):
        study().activations(2)
