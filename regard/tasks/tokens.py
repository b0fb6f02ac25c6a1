"""Vocabularies of word pieces, letters or words, learned from examples."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from regard.tasks.labels import name_some
from regard.tasks.lines import DataError
from regard.tasks.scripts import UNSPACED

# IDs of the special tokens of every vocabulary.
PAD, UNKNOWN, START, END = range(4)
_SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")


class Tokens:
    """A vocabulary, with the conversion between texts and token IDs. Saved as a JSON file of the package `tokenizers`.

    >>> tokens = Tokens.pieces(["a text", "another"], size=100)
    >>> tokens.decode(tokens.encode("a text"))
    'a text'
    >>> letters = Tokens.letters(["abba"])
    >>> letters.encode("ab?"), letters.names([4, 5, 1])  # 0 to 3 are special tokens, 1 is unknown
    ([4, 5, 1], ['a', 'b', '<unk>'])
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        ids = [tokenizer.token_to_id(name) for name in _SPECIAL]
        if ids != [PAD, UNKNOWN, START, END]:
            raise DataError(f"the IDs of {', '.join(_SPECIAL)} are {ids}; expected 0 to 3")

    @classmethod
    def pieces(cls, texts: Iterable[str], size: int) -> Tokens:
        """Learn at most `size` word pieces by byte-pair encoding. Case and punctuation are preserved. Where a script has no
        spaces, each character is a piece.

        Source: Sennrich, Haddow, Birch, "Neural Machine Translation of Rare Words with Subword Units" (2016), section 3.2.
        """
        tk = _tokenizers()
        tokenizer = tk.Tokenizer(tk.models.BPE(unk_token=_SPECIAL[UNKNOWN]))
        tokenizer.normalizer = tk.normalizers.NFC()
        # Pieces do not cross punctuation marks, so that "man" has the same pieces in "man.". In scripts without spaces,
        # they would grow to whole clauses.
        character = tk.Regex(rf"[{UNSPACED}][\p{{Mn}}\p{{Mc}}]*")
        tokenizer.pre_tokenizer = tk.pre_tokenizers.Sequence(
            [
                tk.pre_tokenizers.Metaspace(),
                tk.pre_tokenizers.Punctuation("isolated"),
                tk.pre_tokenizers.Split(character, "isolated"),
            ]
        )
        tokenizer.decoder = tk.decoders.Metaspace()
        trainer = tk.trainers.BpeTrainer(vocab_size=size, special_tokens=list(_SPECIAL), show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def words(cls, texts: Iterable[str], size: int, least: int = 1, lowercase: bool = False) -> Tokens:
        """Collect the (at most) `size` most frequent whitespace-separated words that occur at least `least` times."""
        tk = _tokenizers()
        return cls._symbols(texts, tk.pre_tokenizers.WhitespaceSplit(), None, size, least, lowercase)

    @classmethod
    def letters(cls, texts: Iterable[str], size: int = 1000) -> Tokens:
        """Collect the most frequent characters, including white space."""
        tk = _tokenizers()
        return cls._symbols(
            texts, tk.pre_tokenizers.Split(tk.Regex("(?m)."), "isolated"), tk.decoders.Fuse(), size, 1, False
        )

    @classmethod
    def _symbols(
        cls, texts: Iterable[str], pre_tokenizer: Any, decoder: Any, size: int, least: int, lowercase: bool
    ) -> Tokens:
        tk = _tokenizers()
        normalizer = tk.normalizers.Sequence(
            [tk.normalizers.NFC(), *([tk.normalizers.Lowercase()] if lowercase else [])]
        )
        counts = Counter(
            symbol for text in texts for symbol, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text))
        )
        # By frequency, then alphabetically: the same texts give the same IDs.
        ordered = sorted((x for x in counts if counts[x] >= least and x not in _SPECIAL), key=lambda x: (-counts[x], x))
        ids = {symbol: i for i, symbol in enumerate((*_SPECIAL, *ordered[: size - len(_SPECIAL)]))}
        tokenizer = tk.Tokenizer(tk.models.WordLevel(ids, unk_token=_SPECIAL[UNKNOWN]))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
        if decoder is not None:
            tokenizer.decoder = decoder
        return cls(tokenizer)

    @classmethod
    def load(cls, path: Path) -> Tokens:
        """Load a vocabulary that `save` wrote."""
        try:
            return cls(_tokenizers().Tokenizer.from_file(str(path)))
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        except Exception as error:  # the package raises nothing more specific
            raise DataError(f"{path}: is not a vocabulary of the package tokenizers ({error})") from error

    def save(self, path: Path) -> None:
        """Write the vocabulary as JSON."""
        self._tokenizer.save(str(path))

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Return the token IDs of a text. Special tokens in the text are unknown tokens."""
        return _replace_special(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token IDs of several texts."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [_replace_special(encoding.ids) for encoding in encodings]

    def decode(self, numbers: Sequence[int]) -> str:
        """Return the text of token IDs, without padding, start and end tokens."""
        return str(
            self._tokenizer.decode([n for n in numbers if n not in (PAD, START, END)], skip_special_tokens=False)
        )

    def unknown(self, text: str) -> list[str]:
        """Return the characters of a text that the vocabulary lacks, each once.

        >>> Tokens.letters(["abba"]).unknown("abc")
        ['c']
        """
        characters = dict.fromkeys(x for x in unicodedata.normalize("NFC", text) if not x.isspace())
        rows = self.encode_all(list(characters))
        return [x for x, row in zip(characters, rows, strict=True) if UNKNOWN in row]

    def names(self, numbers: Sequence[int]) -> list[str]:
        """Return the strings of token IDs."""
        return [str(self._tokenizer.id_to_token(number)) for number in numbers]


def remark_on_characters(texts: Sequence[str], tokens: Tokens) -> list[str]:
    """Return a remark, of one line, on characters of texts that a vocabulary lacks.

    >>> remark_on_characters(["a cab", "我"], Tokens.letters(["a cab"]))
    ["1 of 4 characters is unknown to the model, which cannot tell it from others: '我'"]
    """
    text = "".join(texts)
    unknown = tokens.unknown(text)
    if not unknown:
        return []
    total = len({x for x in unicodedata.normalize("NFC", text) if not x.isspace()})
    is_unknown, them = ("is unknown", "it") if len(unknown) == 1 else ("are unknown", "them")
    return [
        f"{len(unknown):,} of {total:,} characters {is_unknown} to the model, which cannot tell {them} from others: "
        f"{name_some(unknown)}"
    ]


def _replace_special(ids: Iterable[int]) -> list[int]:
    """Replace special tokens by unknown tokens: "</s>" in a text does not end the sequence."""
    return [UNKNOWN if i in (PAD, START, END) else i for i in ids]


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("tasks need the package tokenizers: pip install 'regard[tasks]'") from error
    return tokenizers
