"""A tokenizer for a model trained from scratch: byte-level BPE learned from the training text, or an existing one.

Taking some large model's tokenizer would be simpler, but its 49,152 and more embeddings outweigh a small model: at
width 192 they are 9.4M weights beside 2.2M in five layers. Byte-level, so that every text can be written and no unknown
token is needed; one special token ends a text and also serves as the one that begins and pads.

Merges are counted on at most 8 million characters, taken in evenly spaced pieces from all of the training text and
from nothing that is held out. Cost: 2.3 s for 8,192 entries from 35 MB on 2 cores, once; the result lies in the cache
under a digest of the text, so every arm and every resumed run has the same one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fallow.errors import DataError
from fallow.training import data, models
from fallow.training.cache import build_folder, cache_folder, digest_of
from fallow.training.recipe import Recipe

END = "<|endoftext|>"
_FORMAT = 1
_MOST_CHARACTERS = 8_000_000
_PIECE = 1 << 14


def tokenizer_for(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, str]:
    """The tokenizer of a new model, and a line that says where it is from.

    Raises:
        ConfigError: `model` names no tokenizer (where `tokenizer_vocab` is 0).
        DataError: the training text cannot be read, or there is none.
    """
    if not recipe.tokenizer_vocab:
        found = models.load_tokenizer(recipe.model, recipe.gguf_file)
        return found, f"of {recipe.model}, {entries(found):,} entries"
    text = data.Text.of(recipe)
    key = digest_of(_FORMAT, text.identity(), recipe.tokenizer_vocab, _MOST_CHARACTERS, _PIECE)
    folder = build_folder(cache_folder("tokenizers") / key, lambda target: _train(target, text, recipe.tokenizer_vocab))
    found = PreTrainedTokenizerFast.from_pretrained(str(folder))
    return found, f"byte-level BPE of {entries(found):,} entries, trained on the training text"


def entries(tokenizer: PreTrainedTokenizerBase) -> int:
    """Embeddings that the tokenizer needs: its largest id, and one."""
    return max(tokenizer.get_vocab().values()) + 1


def sample(texts: Iterable[str], most: int, piece: int = _PIECE) -> Iterator[str]:
    """Evenly spaced pieces of all texts, `most` characters and at most one piece more; everything when it is less."""
    texts = list(texts)
    total = sum(map(len, texts))
    seen = taken = 0
    for text in texts:
        for start in range(0, len(text), piece):
            part = text[start : start + piece]
            if taken * total <= seen * min(most, total):
                taken += len(part)
                yield part
            seen += len(part)


def _train(target: Path, text: data.Text, vocab: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    train, _ = text.documents()
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(sample(("\n".join(d.values()) for d in train), _MOST_CHARACTERS), trainer=trainer)
    if backend.get_vocab_size() <= 1 + len(pre_tokenizers.ByteLevel.alphabet()) < vocab:
        raise DataError(f"no two bytes of the training text repeat, so no tokenizer of {vocab} entries; add text")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, bos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(str(target))
