"""Tokenizers in the file format of Hugging Face ``tokenizers``, ``tokenizer.json``.

``tokenizers.Tokenizer.from_file`` gives the same ids as ours for every text, and the same text for
all ids. Byte-level BPE is what it is there, too. Bytes are a BPE without merges. Characters are a
``WordLevel`` model behind a pre-tokenizer that makes each character a word; a character that it
does not know is an error, as with ours.
"""

import json
import re
from typing import Any

from mmrec.data.tokenizer import EOT, Tokenizer, byte_characters
from mmrec.errors import InputError

TOKENIZER_FILE, TEMPLATE_FILE = "tokenizer.json", "chat_template.jinja"
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
UNKNOWN = "<unk>"
"""What a ``WordLevel`` model would write for an unknown word. No vocabulary holds it, so that an
unknown word is an error."""


def tokenizer_to_json(tokenizer: Tokenizer, *, declare_special: bool = False) -> str:
    """Return the contents of a ``tokenizer.json``.

    Args:
        tokenizer: the tokenizer.
        declare_special: declare the special tokens, of which the end token begins every text. This
            is what ``transformers.AutoTokenizer`` needs. The library then takes the letters of a
            special token in a text for the token itself, unless it is told not to
            (``encode_special_tokens``).
    """
    model, words, decoder = _parts(tokenizer)
    special = {EOT: tokenizer.eot, **_special_tokens(tokenizer)}
    # special tokens have no text
    pattern = "|".join(re.escape(name) for name in special)
    remove = {"type": "Replace", "pattern": {"Regex": rf"\A(?:{pattern})\z"}, "content": ""}
    contents: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": words,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [remove, decoder]},
        "model": model,
    }
    if declare_special:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        eot = {"SpecialToken": {"id": EOT, "type_id": 0}}
        one, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        contents |= {
            "added_tokens": [
                {"id": token, "content": name, **flags, "special": True}
                for name, token in sorted(special.items(), key=lambda item: item[1])
            ],
            "decoder": decoder,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [eot, one],
                "pair": [eot, one, eot, other],
                "special_tokens": {EOT: {"id": EOT, "ids": [tokenizer.eot], "tokens": [EOT]}},
            },
        }
    return json.dumps(contents, ensure_ascii=False, indent=1) + "\n"


def tokenizer_files(tokenizer: Tokenizer, *, declare_special: bool = False) -> dict[str, str]:
    """The text files of a tokenizer by name; see ``tokenizer_to_json``."""
    files = {TOKENIZER_FILE: tokenizer_to_json(tokenizer, declare_special=declare_special)}
    template = json.loads(tokenizer.to_json()).get("chat_template", "")
    return files | ({TEMPLATE_FILE: template} if template else {})


def _special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids by name of the special tokens besides the end token."""
    found: dict[str, int] = json.loads(tokenizer.to_json()).get("special_tokens", {})
    return found


def _parts(tokenizer: Tokenizer) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The library's model, pre-tokenizer and decoder that do what a tokenizer does.

    The model knows the special tokens by their names, but makes none of any text.
    """
    vocabulary, special = json.loads(tokenizer.to_json())["vocabulary"], _special_tokens(tokenizer)
    merges: list[list[str]] = []
    if tokenizer.kind == "char":
        words = [EOT, *vocabulary]
    elif tokenizer.kind == "byte":
        byte_of = byte_characters()
        words = [*sorted(byte_of, key=byte_of.__getitem__), EOT]
    else:
        stored = json.loads(vocabulary)
        words, merges = stored["tokens"], stored["merges"]
    free = sorted({*range(len(words) + len(special))} - {*special.values()})
    ids = dict(zip(words, free, strict=True)) | special
    if tokenizer.kind == "char":
        model: dict[str, Any] = {"type": "WordLevel", "vocab": ids, "unk_token": UNKNOWN}
        return model, CHARACTERS, {"type": "Fuse"}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": ids,
        "merges": merges,
    }
    return model, BYTE_LEVEL, BYTE_LEVEL


def tokenizer_from_json(text: str, chat_template: str = "") -> Tokenizer:
    """Build the tokenizer that ``tokenizer_to_json`` wrote, or transformers after it.

    Args:
        text: contents of a ``tokenizer.json``.
        chat_template: the chat template, if there is one.

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
        tokenizer = _tokenizer(model, words, chat_template)
        added = [t["content"] for t in stored["added_tokens"]]
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"it is damaged: {type(error).__name__}: {error}") from None
    unknown = [name for name in added if name not in {EOT, *_special_tokens(tokenizer)}]
    if unknown:
        raise InputError(f"mmrec cannot keep its added token {unknown[0]!r}")
    ours = dict(zip(("model", "pre_tokenizer"), _parts(tokenizer), strict=False))
    ours["model"] |= {"merges": model.get("merges", [])} if model["type"] == "BPE" else {}
    for name, expected in (*ours.items(), ("normalizer", None)):
        if stored.get(name) != expected:
            raise InputError(f"its {name} is not one that mmrec export writes")
    return tokenizer


def _tokenizer(model: dict[str, Any], words: list[str], chat_template: str) -> Tokenizer:
    """The tokenizer of a library's model, whose words stand in order of their ids.

    Its special tokens are the words that no text can become.
    """
    values: dict[str, Any] = {}
    if model["type"] == "WordLevel":
        kind, known = "char", {EOT, *(word for word in words if len(word) == 1)}
        values["vocabulary"] = "".join(word for word in words if len(word) == 1)
    elif model["type"] == "BPE":
        merges = [m.split(" ") if isinstance(m, str) else list(m) for m in model["merges"]]
        known = {EOT, *byte_characters(), *(a + b for a, b in merges)}
        tokens = [word for word in words if word in known]
        kind = "bpe" if merges or tokens[0] == EOT else "byte"
        text = json.dumps({"tokens": tokens, "merges": merges}, ensure_ascii=False)
        values["vocabulary"] = text if kind == "bpe" else ""
    else:
        raise InputError(f"its model must be BPE or WordLevel; got {model['type']!r}")
    special = {word: i for i, word in enumerate(words) if word not in known}
    values |= {"special_tokens": special} if special else {}
    values |= {"chat_template": chat_template} if chat_template else {}
    return Tokenizer.from_json(json.dumps({"kind": kind, **values}, ensure_ascii=False))
