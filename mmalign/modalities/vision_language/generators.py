"""Generators of the responses that `prepare.kind` names, with all their models in memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

import torch

from mmalign.config import (
    CompletionConfig,
    DecodingConfig,
    PrepareBdhs,
    PrepareJudged,
    PreparePovid,
    PrepareRealign,
    PrepareResponses,
    Recipe,
)
from mmalign.console import tracked
from mmalign.data.caches import fingerprint
from mmalign.data.pairs import Pairs, ResponsePair
from mmalign.families.base import VisionLanguage
from mmalign.language.vocabularies import CROWDS, load_vocabulary
from mmalign.modalities import loading
from mmalign.modalities.vision_language.model import template_arguments
from mmalign.reading.weights import tensors_only
from mmalign.registry import qualified_name, user_function
from mmalign.rewards import open_clip
from mmalign.rng import KeyedRNG
from mmalign.synthesis.bdhs import ResponseSampler, require_image_masking
from mmalign.synthesis.corrupt import Companions, Corruptor, companions
from mmalign.synthesis.rejected_responses import (
    ImageIndex,
    ReAlign,
    ResponseGenerator,
    Writer,
    hallucinated,
    rule_corrupted,
    self_generated,
    several_generated,
)
from mmalign.synthesis.segments import masker
from mmalign.synthesis.similarity import Similarity, is_fallback, load_similarity

logger = logging.getLogger(__name__)

RULES = "rules"
Settings = PrepareBdhs | PrepareRealign | PreparePovid | PrepareJudged | DecodingConfig


@dataclass(frozen=True)
class Work:
    """Generator of responses, with its dependencies.

    Attributes:
        generate: the generator.
        dependencies: the model, the similarity measure and user functions: all inputs besides settings and rows.
    """

    generate: ResponseGenerator
    dependencies: dict[str, str]


def settings_of(section: PrepareResponses) -> Settings:
    """Return the settings of the section's kind, or their defaults."""
    by_kind: dict[str, Settings | None] = {
        "realign": section.realign,
        "bdhs": section.bdhs or PrepareBdhs(),
        "povid": section.povid or PreparePovid(),
        "own": section.own or DecodingConfig(),
        "judged": section.judged,
    }
    settings = by_kind[section.kind]
    assert settings is not None, "the section has been checked"
    return settings


def load_work(
    recipe: Recipe, section: PrepareResponses, pairs: Pairs[ResponsePair], writer: Writer | None, device: torch.device
) -> Work:
    """Return the generator of the section's kind, with all its models in memory."""
    rng, settings = KeyedRNG(section.seed), settings_of(section)
    if isinstance(settings, PreparePovid):
        return _povid(settings, pairs, rng, writer)
    # The model's own answers: several for a judge, or one
    if not isinstance(settings, PrepareBdhs | PrepareRealign):
        sampler, dependencies = _sampler(recipe, device, rng)
        if isinstance(settings, PrepareJudged):
            return Work(partial(several_generated, sampler, settings, settings.responses_per_prompt), dependencies)
        return Work(partial(self_generated, sampler, settings), dependencies)
    # What may be missing is loaded before the model's gigabytes.
    similarity = _similarity(f"prepare.{section.kind}.similarity", settings, recipe.allow_pickle)
    mask = _mask(settings, writer) if isinstance(settings, PrepareRealign) else None
    sampler, dependencies = _sampler(recipe, device, rng)
    dependencies["similarity by"] = similarity.name
    if not isinstance(settings, PrepareRealign):
        require_image_masking(sampler.family)
        return Work(partial(hallucinated, sampler, settings, similarity), dependencies)
    assert mask is not None
    # Re-Align: answers misled by a similar image
    misled = ReAlign(
        sampler,
        _index(settings, pairs, device, recipe.allow_pickle),
        mask,
        settings,
        similarity,
        max_similarity=settings.max_similarity,
        asking=settings.completion == "ask",
    )
    return Work(misled, {**dependencies, "masker": _named(settings.masker, writer)})


def _sampler(recipe: Recipe, device: torch.device, rng: KeyedRNG) -> tuple[ResponseSampler, dict[str, str]]:
    """Return a sampler of the recipe's model, and the model's path, fingerprint and precision."""
    family: VisionLanguage = loading.load_to_generate(recipe, device)
    dependencies = {
        "model": recipe.model.path,
        "fingerprint": fingerprint.fingerprint_weights(family.network),
        "precision": recipe.train.precision,
        **template_arguments(recipe.model),
    }
    assert isinstance(recipe.prepare, PrepareResponses)
    return ResponseSampler(family, family.network, rng, not recipe.prepare.keep_torn), dependencies


def _similarity(key: str, settings: CompletionConfig, allow_pickle: bool) -> Similarity:
    similarity = load_similarity(key, settings.similarity, allow_pickle=allow_pickle)
    if is_fallback(settings.similarity, similarity):
        logger.warning(f"similarity: {similarity.name}, since no sentence-transformers model is installed")
    return similarity


def _mask(settings: PrepareRealign, writer: Writer | None) -> Writer:
    if writer is not None:
        return writer
    if settings.masker != RULES:
        return _writer("prepare.realign.masker", settings.masker)
    mask = masker(load_vocabulary("prepare.realign.vocabulary", settings.vocabulary))
    return lambda pair: mask(pair.chosen.strip())


def _index(
    settings: PrepareRealign, pairs: Pairs[ResponsePair], device: torch.device, allow_pickle: bool
) -> ImageIndex:
    try:
        with tensors_only(allow_pickle):
            retriever = open_clip.load(settings.retriever, device, open_clip.Config(pretrained=settings.pretrained))
    except ValueError as error:
        raise ValueError(f"prepare.realign.retriever: {str(error).removeprefix('reward open_clip: ')}") from error
    return ImageIndex(tracked(pairs, "compare images"), retriever.embed, settings.candidates)


def _povid(settings: PreparePovid, pairs: Pairs[ResponsePair], rng: KeyedRNG, writer: Writer | None) -> Work:
    if writer is None and settings.corruptor != RULES:
        writer = _writer("prepare.povid.corruptor", settings.corruptor)
    if writer is not None:
        return Work(partial(rule_corrupted, writer), {"corruptor": qualified_name(writer)})
    # Rules on a vocabulary, and on objects that appear together: the bundled world knows them, answers are counted
    vocabulary = load_vocabulary("prepare.povid.vocabulary", settings.vocabulary)
    together: Companions
    if settings.vocabulary == CROWDS:
        from mmalign.toy.crowds import PARTNERS

        together = {kind: [partner] for kind, partner in PARTNERS.items()}
    else:
        together = companions((pair.chosen for pair in pairs), vocabulary)
    corrupt = Corruptor(vocabulary, together, settings.share, settings.beside)
    rules = partial(rule_corrupted, lambda pair: corrupt(pair.chosen.strip(), pair.row, rng))
    return Work(rules, {"corruptor": RULES})


def _writer(key: str, name: str) -> Writer:
    """Return the function that the recipe names at `key`."""
    return user_function(key, name, ["pair"], "text, or None", lambda text: text is None or isinstance(text, str))


def _named(name: str, writer: Writer | None) -> str:
    return name if writer is None else qualified_name(writer)
