"""The paper's blind protocol: explain a feature from its circuit before seeing any text.

A feature is studied on prompts that are known by number only (Dunefsky, Chlenski, Nanda 2024).
Activations, contributions and paths name positions and never tokens; what does not depend on the
input (de-embedding, logit effects) may be looked at freely. Then the hypothesis is written down,
and only then are the tokens shown. In the *restricted* form, what layer-0 features do on a prompt
is banned as well, since most of them stand for one token and so give the text away.

It is a protocol, not a lock: it keeps an honest reader honest and its log shows what was looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nnsight_transcoders.errors import InputError
from nnsight_transcoders.remote.server import Remote
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites

from .contributions import CircuitRun
from .feature_vectors import Contribution, FeatureVector
from .paths import Path, Where, top_paths
from .summary import Ranked, activations, check_feature, ranked_tokens
from .weights import de_embeddings, logit_effects

Prompt = str | Sequence[int] | Tensor

_FIRST_FEATURES = Where(kinds={"feature"}, layers={0})


@dataclass(frozen=True)
class Access:
    """One line of a study's log.

    Attributes:
        action: What was asked for, such as ``"paths"``; ``"hypothesis"`` and ``"reveal"`` as well.
        details: With which arguments.
        refused: Whether the protocol forbade it.
    """

    action: str
    details: str
    refused: bool = False

    def __str__(self) -> str:
        return f"{self.action}({self.details}){' refused' if self.refused else ''}"


@dataclass(frozen=True)
class RevealedPrompt:
    """A text with the feature's activation at each of its tokens.

    Attributes:
        tokens: As text.
        activations: ``len(tokens)`` numbers; zero where it is not active.
    """

    tokens: tuple[str, ...]
    activations: tuple[float, ...]

    @property
    def peak(self) -> float:
        """The largest activation."""
        return max(self.activations)

    def __str__(self) -> str:
        pairs = zip(self.tokens, self.activations, strict=True)
        return "".join(f"{t}[{a:.2f}]" if a else t for t, a in pairs)


@dataclass(frozen=True)
class Reveal:
    """What a study was about.

    Attributes:
        hypothesis: What was written down before.
        prompts: The study's prompts, in order.
        examples: The texts of the corpus on which the feature is most active, the top ones first.
    """

    hypothesis: str
    prompts: tuple[RevealedPrompt, ...]
    examples: tuple[RevealedPrompt, ...]

    def __str__(self) -> str:
        lines = [f"Hypothesis: {self.hypothesis}", "Prompts:"]
        lines += [f"  {i}: {prompt}" for i, prompt in enumerate(self.prompts)]
        if self.examples:
            lines += ["Top examples:", *(f"  {e.peak:.2f}  {e}" for e in self.examples)]
        return "\n".join(lines)


class BlindStudy:
    """One feature, prompts by number, tokens hidden until a hypothesis is written down.

    Args:
        model: An nnsight model.
        transcoders: Its set.
        prompts: What the feature is studied on; best drawn by somebody else, or at random.
        layer: The feature's layer.
        index: Its number.
        restricted: Also ban what layer-0 features do on the prompts.
        corpus: Texts for the top examples, run when they are revealed.
        sites: The model's sites, where they have to be given by hand.
        remote: The model is on a server: True, an address, or a ``RemoteServer``.

    Raises:
        InputError: No prompts, no such feature, or a layer-0 feature in a restricted study.
    """

    def __init__(
        self,
        model: Any,
        transcoders: TranscoderSet,
        prompts: Sequence[Prompt],
        layer: int,
        index: int,
        *,
        restricted: bool = False,
        corpus: Sequence[Prompt] = (),
        sites: Sites | None = None,
        remote: Remote | None = None,
    ) -> None:
        if isinstance(prompts, str) or not len(prompts):
            raise InputError("prompts must be a list with at least one prompt")
        check_feature(transcoders, layer, index)
        if restricted and layer == 0:
            raise InputError(
                "a restricted study cannot be about a layer-0 feature, whose activations it bans: "
                "pass restricted=False or another layer"
            )
        self.layer, self.index, self.restricted = layer, index, restricted
        self._model, self._set = model, transcoders
        self._where: dict[str, Any] = {"sites": sites, "remote": remote}
        self._prompts, self._corpus = list(prompts), list(corpus)
        self._runs: dict[int, CircuitRun] = {}
        self._hypothesis: str | None = None
        self._revealed = False
        self._log: list[Access] = []

    def __len__(self) -> int:
        return len(self._prompts)

    def __repr__(self) -> str:
        kind = "restricted study" if self.restricted else "study"
        return f"Blind {kind} of feature {self.index} of layer {self.layer}, {len(self)} prompts"

    @property
    def log(self) -> tuple[Access, ...]:
        """Everything that was asked for, in order."""
        return tuple(self._log)

    # -- what depends on the input: by position only ---------------------------------------------

    def activations(
        self, prompt: int, layer: int | None = None, index: int | None = None
    ) -> dict[int, float]:
        """Position -> activation on a prompt, where the feature is active.

        Args:
            prompt: Its number.
            layer: Of another feature (default: the one under study).
            index: Of another feature.

        Raises:
            InputError: No such prompt or feature, or one that a restricted study bans.
        """
        layer = self.layer if layer is None else layer
        index = self.index if index is None else index
        banned = self.restricted and layer == 0
        self._note("activations", f"prompt {prompt}, layer {layer}, feature {index}", banned)
        if banned:
            raise InputError(
                "a restricted study does not show what layer-0 features do on a prompt: use "
                "logit_effects() or de_embedding(), or study with restricted=False"
            )
        check_feature(self._set, layer, index)
        return activations(self._run(prompt), layer, index)

    def contributions(self, prompt: int, position: int) -> list[Contribution]:
        """What contributes directly to the feature, largest first (see ``CircuitRun``).

        In a restricted study layer-0 features are left out, so that the terms need not add up.
        """
        self._note("contributions", f"prompt {prompt}, position {position}")
        circuit = self._run(prompt)
        found = circuit.contributions(self._target(circuit, position))
        shown = [one for one in found if not (self.restricted and _FIRST_FEATURES(one))]
        return sorted(shown, key=lambda one: -abs(one.value))

    def paths(self, prompt: int, position: int, **options: Any) -> list[Path]:
        """The paths that carry most to the feature.

        In a restricted study none goes through a layer-0 feature.

        Args:
            prompt: Its number.
            position: Where the feature is active.
            **options: See ``top_paths``.
        """
        self._note("paths", f"prompt {prompt}, position {position}")
        if self.restricted:
            allowed, where = ~_FIRST_FEATURES, options.pop("where", None)
            options["where"] = allowed if where is None else lambda c: allowed(c) and where(c)
        circuit = self._run(prompt)
        return top_paths(circuit, self._target(circuit, position), **options)

    # -- what does not depend on the input -------------------------------------------------------

    def logit_effects(
        self, layer: int | None = None, index: int | None = None, top: int = 8
    ) -> tuple[Ranked, Ranked]:
        """The tokens that a feature (default: the one under study) raises most and lowers most."""
        at = self._invariant("logit_effects", layer, index)
        effects = logit_effects(self._model, self._set, at[0], [at[1]], **self._where)[0]
        raised = ranked_tokens(self._model, effects, top)
        return raised, ranked_tokens(self._model, effects, top, largest=False)

    def de_embedding(
        self, layer: int | None = None, index: int | None = None, top: int = 8
    ) -> Ranked:
        """The tokens that would switch a feature (default: the one under study) on most."""
        at = self._invariant("de_embedding", layer, index)
        reads = de_embeddings(self._model, self._set, at[0], [at[1]], **self._where)[0]
        return ranked_tokens(self._model, reads, top)

    # -- the end ---------------------------------------------------------------------------------

    @property
    def hypothesis(self) -> str | None:
        """What the feature stands for; write it down before ``reveal``."""
        return self._hypothesis

    @hypothesis.setter
    def hypothesis(self, text: str) -> None:
        if self._revealed:
            self._note("hypothesis", text, refused=True)
            raise InputError("the tokens have been shown: the hypothesis can no longer be changed")
        if not text.strip():
            raise InputError("the hypothesis is empty: say what the feature stands for")
        self._note("hypothesis", text)
        self._hypothesis = text

    def reveal(self, top: int = 10) -> Reveal:
        """Show the tokens of the prompts, and the corpus' top examples.

        Raises:
            InputError: No hypothesis was written down.
        """
        self._note("reveal", f"top {top}", refused=self._hypothesis is None)
        if self._hypothesis is None:
            raise InputError(
                "write the hypothesis down first: study.hypothesis = '...', then study.reveal()"
            )
        self._revealed = True
        prompts = tuple(self._shown(self._run(i)) for i in range(len(self)))
        examples = [self._shown(self._collect(text)) for text in self._corpus]
        examples = sorted((e for e in examples if e.peak > 0), key=lambda e: -e.peak)
        return Reveal(self._hypothesis, prompts, tuple(examples[:top]))

    # -- inside ----------------------------------------------------------------------------------

    def _note(self, action: str, details: str, refused: bool = False) -> None:
        self._log.append(Access(action, details, refused))

    def _invariant(self, action: str, layer: int | None, index: int | None) -> tuple[int, int]:
        layer = self.layer if layer is None else layer
        index = self.index if index is None else index
        check_feature(self._set, layer, index)
        self._note(action, f"layer {layer}, feature {index}")
        return layer, index

    def _collect(self, prompt: Prompt) -> CircuitRun:
        return CircuitRun.collect(self._model, self._set, prompt, **self._where)

    def _run(self, prompt: int) -> CircuitRun:
        if not 0 <= prompt < len(self):
            raise InputError(f"the study has prompts 0 to {len(self) - 1}, not {prompt}")
        if prompt not in self._runs:
            self._runs[prompt] = self._collect(self._prompts[prompt])
        return self._runs[prompt]

    def _target(self, circuit: CircuitRun, position: int) -> FeatureVector:
        return circuit.feature(self.layer, self.index, position)

    def _shown(self, circuit: CircuitRun) -> RevealedPrompt:
        tokens, found = circuit.token_texts, activations(circuit, self.layer, self.index)
        return RevealedPrompt(tokens, tuple(found.get(i, 0.0) for i in range(len(tokens))))
