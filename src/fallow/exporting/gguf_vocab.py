"""A byte-level BPE tokenizer written into a GGUF file: tokens, kinds, merges, and how text is cut before merging.

llama.cpp knows no regular expressions but a list of named cuts, so a tokenizer goes along if its cut is on that list;
else the file is written without vocabulary, works on token ids only, and the export says so. Guessing a near cut would
give other tokens on some texts and no error; so what is written is also compared on text (`gguf_check`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS = {
    "gpt-2": [("ByteLevel", True)],
    "llama-bpe": [(_LLAMA3, False)],
    "qwen2": [(_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"), False)],
    "smollm": [("Digits", True)],
}
"""llama.cpp's name -> the cuts in tokenizer.json: pattern of each Split (or its type), and ByteLevel's use_regex."""


def add_vocab(writer: Any, folder: Path, tokenizer: PreTrainedTokenizerBase | None, entries: int) -> str:
    """Write the tokenizer of `folder` into the file and say what was written.

    Args:
        writer: a `gguf.GGUFWriter`.
        folder: holds tokenizer.json where there is a tokenizer.
        tokenizer: the same, loaded.
        entries: rows of the embedding; ids without a token are filled up.
    """
    from gguf import TokenType

    file = folder / "tokenizer.json"
    if tokenizer is None or not file.is_file():
        return _without(writer, "no tokenizer was given")
    spec = json.loads(file.read_text())
    kind, cut = spec["model"].get("type"), _cut(spec.get("pre_tokenizer"))
    if kind != "BPE" or spec["model"].get("byte_fallback") or cut is None or spec.get("normalizer"):
        return _without(writer, f"llama.cpp has no equal of this {kind} tokenizer")
    if len(tokenizer) > entries:
        return _without(writer, f"the tokenizer has {len(tokenizer)} tokens, the embedding {entries} rows")
    tokens = [f"[UNUSED{n}]" for n in range(entries)]
    types = [TokenType.UNUSED] * entries
    for token, n in spec["model"]["vocab"].items():
        tokens[n], types[n] = token, TokenType.NORMAL
    for added in spec.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]])
    for name in ("bos", "eos", "pad", "unk"):
        if (n := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(n)
    begins = bool(ids := tokenizer("a")["input_ids"]) and ids[0] == tokenizer.bos_token_id  # type: ignore[index]
    writer.add_add_bos_token(begins)
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(template)
    return f"vocabulary of {len(tokenizer):,} tokens in the file, text cut as {cut}"


def _without(writer: Any, reason: str) -> str:
    writer.add_tokenizer_model("no_vocab")
    return f"no vocabulary in the file ({reason}): it takes token ids, no text"


def _cut(pre: dict[str, Any] | None) -> str | None:
    """llama.cpp's name of a pre-tokenizer, or None."""
    if pre is None:
        return None
    parts = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    found: list[tuple[str, bool]] = []
    if parts[-1]["type"] != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    by_regex = bool(parts[-1].get("use_regex", True))
    for part in parts[:-1]:
        if part["type"] == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
            found.append((part["pattern"].get("Regex", ""), by_regex))
        elif part["type"] == "Digits" and part.get("individual_digits"):
            found.append(("Digits", by_regex))
        else:
            return None
    if not found:
        found = [("ByteLevel", by_regex)]
    return next((name for name, cut in _CUTS.items() if cut == found), None)
