"""`SentenceEncoder`, `Tagger` and `Classifier`, and the batches that they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regard import Summary
from regard.models.classifier import Classifier
from regard.models.sentence_encoder import KINDS, SentenceBatch, SentenceEncoder
from regard.models.tagger import Tagger
from regard.tasks.tokens import UNKNOWN
from regard.tasks.words import learn_tokens, spell, words_of

SENTENCES = [["the", "cat", "sat"], ["a", "cat", "10 000", "mats", "the", "the", "strangely"], ["mats"]]
TOKENS = learn_tokens(SENTENCES, 100, lowercase=False)
_SIZES: dict[str, Any] = {"width": 24, "layers": 2, "heads": 4, "dropout": 0.2, "unseen": 0.5}


def _sizes() -> tuple[int, int]:
    return len(TOKENS["words"]), len(TOKENS["letters"])


def test_split_words_and_punctuation() -> None:
    assert words_of("Don't stop the well-known (“band”), it's O'Neill!") == [
        "Do", "n't", "stop", "the", "well-known", "(", "“", "band", "”", ")", ",", "it", "'s", "O'Neill", "!",
    ]  # fmt: skip
    # Tokens of a corpus are not split further.
    for text in ("ca n't , it 's . we 'LL n't", "the 1990s ' s"):
        assert words_of(text) == text.split()
    assert words_of(" \n") == []
    # Scripts without spaces: a word per character, with its marks. Marks do not end a word elsewhere, either.
    assert words_of("我爱PyTorch，真的。") == ["我", "爱", "PyTorch", "，", "真", "的", "。"]
    assert words_of("タワーへ") == ["タ", "ワ", "ー", "へ"]
    assert words_of("ที่นี่") == ["ที่", "นี่"]
    assert words_of("हिन्दी में") == ["हिन्दी", "में"]
    assert words_of("cafe\u0301 e\u0301te\u0301") == ["cafe\u0301", "e\u0301te\u0301"]


def test_spell_returns_words_and_letters() -> None:
    text = spell(SENTENCES, TOKENS)
    assert text.lengths.tolist() == [3, 7, 1]
    for row, words in enumerate(SENTENCES):
        for column, word in enumerate(words):
            which = int(text.spelled[row, column])
            letters = text.letters[which, : int(text.letter_lengths[which])].tolist()
            assert TOKENS["letters"].names(letters) == list(word.replace(" ", "_"))
    # A word that occurs once is not in the vocabulary.
    known = {
        word: int(text.words[row, column]) for row, words in enumerate(SENTENCES) for column, word in enumerate(words)
    }
    assert known["sat"] == known["strangely"] == UNKNOWN
    assert known["cat"] != known["the"] != UNKNOWN
    assert int(spell([["", "  "]], TOKENS).letter_lengths.min()) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [SentenceEncoder, Tagger, Classifier])
def test_batch_rows_and_padding_are_independent(kind: str, make: type[torch.nn.Module]) -> None:
    torch.manual_seed(0)
    labels = () if make is SentenceEncoder else (5,)
    model = make(*_sizes(), *labels, kind=kind, **_SIZES).double().eval()
    together = model(spell(SENTENCES, TOKENS))
    assert together.shape == {SentenceEncoder: (3, 7, 24), Tagger: (3, 7, 5), Classifier: (3, 5)}[make]
    for row, words in enumerate(SENTENCES):
        alone = model(spell([words], TOKENS))[0]
        whole = together[row] if make is Classifier else together[row, : len(words)]
        torch.testing.assert_close(alone, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_learn_and_unseen_words_in_training_only(kind: str) -> None:
    torch.manual_seed(0)
    model = Classifier(*_sizes(), 3, kind=kind, **_SIZES)
    text = spell(SENTENCES, TOKENS)
    model.train()(text).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())] == []
    model.eval()
    assert torch.equal(model(text), model(text))
    blind = SentenceEncoder(*_sizes(), kind=kind, **{**_SIZES, "unseen": 1.0, "dropout": 0.0})
    unknown = text._replace(words=torch.full_like(text.words, UNKNOWN))
    statistics, expected = blind.train()(text), blind.eval()(unknown)
    real = torch.arange(7) < text.lengths[:, None]
    torch.testing.assert_close(statistics[real], expected[real])


def test_outputs_depend_on_word_order() -> None:
    for kind in KINDS:
        torch.manual_seed(0)
        model = SentenceEncoder(*_sizes(), kind=kind, **_SIZES).double().eval()
        one, two = (model(spell([words], TOKENS))[0] for words in (["the", "cat", "sat"], ["sat", "cat", "the"]))
        assert not torch.allclose(one, two.flip(0), atol=1e-3)


def test_classifier_summary_is_attention_over_words() -> None:
    model = Classifier(*_sizes(), 3, **_SIZES).eval()
    scores, statistics = model(spell(SENTENCES, TOKENS), summary=Summary(full=True))
    assert torch.equal(scores, model(spell(SENTENCES, TOKENS)))
    assert statistics.full.shape == (3, 4, 1, 7)
    assert bool((statistics.full[2, :, :, 1:] == 0).all())


def test_invalid_kind_raises() -> None:
    with pytest.raises(ValueError, match="SentenceEncoder: kind is 'x'; expected one of recurrent, transformer, conv"):
        SentenceEncoder(3, 3, kind="x")
    assert SentenceBatch._fields == ("words", "lengths", "letters", "letter_lengths", "spelled")
