"""Tokenizers in the file format of Hugging Face ``tokenizers``, ``tokenizer.json``.

``tokenizers.Tokenizer.from_file`` gives the same ids as ours for every text, and the same text for
all ids. Byte-level BPE is what it is there, too. Bytes are a BPE without merges. Characters are a
``WordLevel`` model behind a pre-tokenizer that makes each character a word; a character that it
does not know is an error, as with ours.
"""

import json
from typing import Any

from mmrec.data.tokenizer import EOT, Tokenizer, byte_characters
from mmrec.errors import InputError

BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
"""How texts become words of characters that stand for bytes, and how those become text again."""
CHARACTERS = {
    "type": "Split",
    "pattern": {"Regex": r"[\s\S]"},
    "behavior": "Isolated",
    "invert": False,
}
"""Each character is a word."""
WITHOUT_EOT = {"type": "Replace", "pattern": {"Regex": r"\A<\|endoftext\|>\z"}, "content": ""}
"""The end of a document has no text."""
UNKNOWN = "<unk>"
"""What a ``WordLevel`` model would write for an unknown word. No vocabulary holds it, so that an
unknown word is an error."""


def tokenizer_to_json(tokenizer: Tokenizer, *, special_eot: bool = False) -> str:
    """Return the contents of a ``tokenizer.json``.

    Args:
        tokenizer: the tokenizer.
        special_eot: declare the end token as a special token that begins every text, which is what
            ``transformers.AutoTokenizer`` needs. The library then takes the letters of the token
            in a text for the token itself, unless it is told not to (``encode_special_tokens``).
    """
    model, words, decoder = _parts(tokenizer)
    eot = {"id": EOT, "type_id": 0}
    contents: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": words,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [WITHOUT_EOT, decoder]},
        "model": model,
    }
    if special_eot:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        token = {"id": tokenizer.eot, "content": EOT, **flags, "special": True}
        one, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        contents |= {
            "added_tokens": [token],
            "decoder": decoder,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": eot}, one],
                "pair": [{"SpecialToken": eot}, one, {"SpecialToken": eot}, other],
                "special_tokens": {EOT: {"id": EOT, "ids": [tokenizer.eot], "tokens": [EOT]}},
            },
        }
    return json.dumps(contents, ensure_ascii=False, indent=1) + "\n"


def _parts(tokenizer: Tokenizer) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The library's model, pre-tokenizer and decoder that do what a tokenizer does."""
    vocabulary = json.loads(tokenizer.to_json())["vocabulary"]
    if tokenizer.kind == "char":
        ids = {word: i for i, word in enumerate([EOT, *vocabulary])}
        model: dict[str, Any] = {"type": "WordLevel", "vocab": ids, "unk_token": UNKNOWN}
        return model, CHARACTERS, {"type": "Fuse"}
    if tokenizer.kind == "byte":
        byte_of = byte_characters()
        tokens, merges = [*sorted(byte_of, key=byte_of.__getitem__), EOT], []
    else:
        stored = json.loads(vocabulary)
        tokens, merges = stored["tokens"], stored["merges"]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {word: i for i, word in enumerate(tokens)},
        "merges": merges,
    }
    return model, BYTE_LEVEL, BYTE_LEVEL


def tokenizer_from_json(text: str) -> Tokenizer:
    """Build the tokenizer that ``tokenizer_to_json`` wrote, or transformers after it.

    Args:
        text: contents of a ``tokenizer.json``.

    Raises:
        InputError: the text is damaged, or describes a tokenizer that mmrec does not have.
    """
    try:
        stored = json.loads(text)
        model = stored["model"]
        ids = model["vocab"]
        words = sorted(ids, key=ids.__getitem__)
        if [ids[word] for word in words] != list(range(len(words))):
            raise ValueError(f"its ids must be 0 to {len(words) - 1}")
        tokenizer = _tokenizer(model, words)
        others = [t["content"] for t in stored["added_tokens"] if t["content"] != EOT]
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"it is damaged: {type(error).__name__}: {error}") from None
    if others:
        raise InputError(f"mmrec's tokenizers have one special token, {EOT}; it adds {others[0]!r}")
    ours = dict(zip(("model", "pre_tokenizer"), _parts(tokenizer), strict=False))
    ours["model"] |= {"merges": model.get("merges", [])} if model["type"] == "BPE" else {}
    for name, expected in (*ours.items(), ("normalizer", None)):
        if stored.get(name) != expected:
            raise InputError(f"its {name} is not one that mmrec export writes")
    return tokenizer


def _tokenizer(model: dict[str, Any], words: list[str]) -> Tokenizer:
    """The tokenizer of a library's model, whose words stand in order of their ids."""
    if model["type"] == "WordLevel":
        if words[:1] != [EOT] or any(len(word) != 1 for word in words[1:]):
            raise ValueError(f"its words must be {EOT} and characters")
        return Tokenizer("char", "".join(words[1:]))
    if model["type"] != "BPE":
        raise InputError(f"its model must be BPE or WordLevel; got {model['type']!r}")
    merges = [m.split(" ") if isinstance(m, str) else list(m) for m in model["merges"]]
    if not merges and words[-1] == EOT:
        return Tokenizer("byte", "")
    vocabulary = json.dumps({"tokens": words, "merges": merges}, ensure_ascii=False)
    return Tokenizer("bpe", vocabulary)
