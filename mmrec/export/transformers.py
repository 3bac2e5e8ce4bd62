"""Models as folders that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load.

A folder holds what ``mmrec.export.safetensors`` writes, and two files of this package:
``configuration_mmrec.py`` and ``modeling_mmrec.py``, which transformers runs with
``trust_remote_code=True``. Writing it needs no transformers.
"""

import json
from importlib import resources
from pathlib import Path
from typing import Any

from mmrec.checkpoint.checkpoint import LoadedModel
from mmrec.data.chat_template import ChatTemplate
from mmrec.data.tokenizer import EOT
from mmrec.export.safetensors import CONFIG_FILE, config_to_json, write_folder
from mmrec.export.tokenizer import TEMPLATE_FILE, tokenizer_files

CODE_FILES = ("configuration_mmrec.py", "modeling_mmrec.py")
AUTO_MAP = {
    "AutoConfig": "configuration_mmrec.MMRecConfig",
    "AutoModel": "modeling_mmrec.MMRecModel",
    "AutoModelForCausalLM": "modeling_mmrec.MMRecForCausalLM",
}


def export_transformers(loaded: LoadedModel, folder: Path) -> None:
    """Write a model for transformers.

    Args:
        loaded: the model.
        folder: where to write; it is made if it is not there.

    Raises:
        InputError: the package safetensors is missing.
        StorageError: the system refused.
    """
    eot = loaded.tokenizer.eot
    texts = tokenizer_files(loaded.tokenizer, declare_special=True)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), EOT),
        # the letters of the end token in a text stay letters, unless a chat template writes them
        "split_special_tokens": TEMPLATE_FILE not in texts,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    generation_config: dict[str, Any] = dict.fromkeys(("bos_token_id", "pad_token_id"), eot)
    generation_config["eos_token_id"] = eot
    if loaded.tokenizer.chat_template:
        end_of_turn = ChatTemplate(loaded.tokenizer.chat_template, loaded.tokenizer).end_of_turn
        generation_config["eos_token_id"] = [eot, *([] if end_of_turn is None else [end_of_turn])]
    code = resources.files("mmrec.export")
    write_folder(
        loaded,
        folder,
        {
            CONFIG_FILE: config_to_json(loaded, auto_map=AUTO_MAP),
            **texts,
            "tokenizer_config.json": json.dumps(tokenizer_config, indent=2) + "\n",
            "generation_config.json": json.dumps(generation_config, indent=2) + "\n",
            **{name: code.joinpath(name).read_text("utf-8") for name in CODE_FILES},
        },
    )
