"""Texts as numbers and back: pieces of words, letters, or words, learned from examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from regard.tasks.data import DataError

# The numbers of the tokens that every vocabulary has.
PAD, UNKNOWN, START, END = range(4)
_SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")


class Tokens:
    """A vocabulary, and how texts are cut into its tokens. Kept in one JSON file, that of the package `tokenizers`.

    >>> tokens = Tokens.pieces(["a text", "another"], size=100)
    >>> tokens.decode(tokens.encode("a text"))
    'a text'
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        found = [tokenizer.token_to_id(name) for name in _SPECIAL]
        if found != [PAD, UNKNOWN, START, END]:
            raise DataError(f"the vocabulary numbers {', '.join(_SPECIAL)} as {found}; expected 0 to 3")

    @classmethod
    def pieces(cls, texts: Iterable[str], size: int) -> Tokens:
        """Pieces of words by byte-pair encoding, `size` of them at most; case and punctuation are kept.

        Source: Sennrich, Haddow, Birch, "Neural Machine Translation of Rare Words with Subword Units" (2016), section 3.2.
        """
        tk = _tokenizers()
        made = tk.Tokenizer(tk.models.BPE(unk_token=_SPECIAL[UNKNOWN]))
        made.normalizer = tk.normalizers.NFC()
        # A piece does not reach over a punctuation mark: "man." would be another word than "man".
        made.pre_tokenizer = tk.pre_tokenizers.Sequence(
            [tk.pre_tokenizers.Metaspace(), tk.pre_tokenizers.Punctuation("isolated")]
        )
        made.decoder = tk.decoders.Metaspace()
        trainer = tk.trainers.BpeTrainer(vocab_size=size, special_tokens=list(_SPECIAL), show_progress=False)
        made.train_from_iterator(texts, trainer)
        return cls(made)

    @classmethod
    def words(cls, texts: Iterable[str], size: int, least: int = 1, lowercase: bool = False) -> Tokens:
        """What white space divides, if it occurs at least so often; the `size` most frequent at most."""
        tk = _tokenizers()
        return cls._symbols(texts, tk.pre_tokenizers.WhitespaceSplit(), None, size, least, lowercase)

    @classmethod
    def letters(cls, texts: Iterable[str], size: int = 1000) -> Tokens:
        """The characters of a text, white space too."""
        tk = _tokenizers()
        return cls._symbols(
            texts, tk.pre_tokenizers.Split(tk.Regex("(?m)."), "isolated"), tk.decoders.Fuse(), size, 1, False
        )

    @classmethod
    def _symbols(
        cls, texts: Iterable[str], divided: Any, decoder: Any, size: int, least: int, lowercase: bool
    ) -> Tokens:
        tk = _tokenizers()
        normalizer = tk.normalizers.Sequence(
            [tk.normalizers.NFC(), *([tk.normalizers.Lowercase()] if lowercase else [])]
        )
        counts = Counter(
            symbol for text in texts for symbol, _ in divided.pre_tokenize_str(normalizer.normalize_str(text))
        )
        # By frequency, then by the alphabet: the same texts give the same numbers.
        ordered = sorted((x for x in counts if counts[x] >= least and x not in _SPECIAL), key=lambda x: (-counts[x], x))
        numbers = {symbol: number for number, symbol in enumerate((*_SPECIAL, *ordered[: size - len(_SPECIAL)]))}
        made = tk.Tokenizer(tk.models.WordLevel(numbers, unk_token=_SPECIAL[UNKNOWN]))
        made.normalizer, made.pre_tokenizer = normalizer, divided
        if decoder is not None:
            made.decoder = decoder
        return cls(made)

    @classmethod
    def load(cls, path: Path) -> Tokens:
        """The vocabulary that `save` wrote."""
        try:
            return cls(_tokenizers().Tokenizer.from_file(str(path)))
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        except Exception as error:  # the package raises nothing more exact
            raise DataError(f"{path}: is no vocabulary of the package tokenizers ({error})") from error

    def save(self, path: Path) -> None:
        """Write the vocabulary as JSON."""
        self._tokenizer.save(str(path))

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """The numbers of a text's tokens."""
        return _plain(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The same for many texts, side by side."""
        return [_plain(found.ids) for found in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, numbers: Sequence[int]) -> str:
        """The text of tokens; those that mark a place are left out."""
        return str(
            self._tokenizer.decode([n for n in numbers if n not in (PAD, START, END)], skip_special_tokens=False)
        )

    def names(self, numbers: Sequence[int]) -> list[str]:
        """The tokens themselves, as the vocabulary writes them."""
        return [str(self._tokenizer.id_to_token(number)) for number in numbers]


def _plain(numbers: Iterable[int]) -> list[int]:
    """A text that writes "</s>" ends nothing."""
    return [UNKNOWN if number in (PAD, START, END) else number for number in numbers]


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("tasks need the package tokenizers: pip install 'regard[tasks]'") from error
    return tokenizers
