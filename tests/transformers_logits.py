"""Write the logits that this Python's transformers computes for each model folder below a folder.

    python transformers_logits.py FOLDERS IDS.safetensors OUT.safetensors

Run by `test_two_environments.py` under two versions of transformers; nothing of Moesaic is used.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file


@torch.no_grad()
def main(folders: str, ids_file: str, out: str) -> None:
    ids = load_file(ids_file)["ids"]
    # The same plain code for attention and experts in both versions, so that what differs is
    # what they read.
    options = {"attn_implementation": "eager"}
    if int(transformers.__version__.split(".")[0]) >= 5:
        options["experts_implementation"] = "eager"
    logits = {}
    for folder in sorted(Path(folders).iterdir()):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, **options
        ).eval()
        whole = model(ids, use_cache=False).logits
        past, pieces = None, []
        for piece in ids.split([7] + [1] * (ids.shape[1] - 7), dim=1):
            step = model(piece, past_key_values=past, use_cache=True)
            past = step.past_key_values
            pieces.append(step.logits)
        logits[folder.name] = torch.stack([whole, torch.cat(pieces, dim=1)])
    save_file(logits, out, metadata={"transformers": transformers.__version__})


if __name__ == "__main__":
    main(*sys.argv[1:])
