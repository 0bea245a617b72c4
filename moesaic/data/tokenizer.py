"""The tokenizer files of a model folder: load them, copy them, tell two of them apart.

Nothing here loads torch; transformers is imported when a tokenizer is loaded.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.errors import FolderError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a tokenizer may consist of, as glob patterns."""


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a Hugging Face model folder, without touching the network.

    Raises:
        FolderError: If there is none, it cannot be read, or it has no fast version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FolderError(f"The tokenizer folder {folder} does not exist.")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise FolderError(f"{folder} holds no tokenizer: it has no tokenizer.json.")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # Transformers has no class for skywork, and AutoTokenizer stumbles over that.
    loader: Any = PreTrainedTokenizerFast if _is_skywork(folder) else AutoTokenizer
    try:
        tokenizer: Any = loader.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers lets through whatever its parsers raise
        reason = " ".join(str(error).split())[:200]
        raise FolderError(f"The tokenizer in {folder} cannot be read: {reason}") from error
    if not tokenizer.is_fast:
        raise FolderError(f"The tokenizer in {folder} has no fast version. Add a tokenizer.json.")
    fast: PreTrainedTokenizerFast = tokenizer
    return fast


def _is_skywork(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "skywork"


def copy_tokenizer(source: str | Path, out: str | Path) -> None:
    """Copy the tokenizer's files, byte for byte, into the existing folder `out`."""
    for pattern in TOKENIZER_FILES:
        for path in sorted(Path(source).glob(pattern)):
            shutil.copyfile(path, Path(out) / path.name)


def tokenizer_hash(folder: str | Path) -> str:
    """Say in 64 hexadecimal digits how a folder's tokenizer turns text into numbers.

    It is the SHA-256 of `tokenizer.json` in canonical form: without `truncation` and `padding`,
    which using a tokenizer changes, keys sorted, no spaces, UTF-8. A folder without that
    file is known by its `tokenizer.model`, taken as bytes.

    Raises:
        FolderError: If neither file is there, or `tokenizer.json` is not JSON.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        model = Path(folder) / "tokenizer.model"
        if not model.is_file():
            raise FolderError(f"{folder} holds no tokenizer: it has no tokenizer.json.")
        return hashlib.sha256(model.read_bytes()).hexdigest()
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise FolderError(f"{path} is not JSON: {error}") from error
    content = {key: content[key] for key in content if key not in ("truncation", "padding")}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
