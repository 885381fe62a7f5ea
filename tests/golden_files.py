"""The golden files of tests/golden: weights, config, and what the original systems computed with them."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from looplm.hf.convert import load_foreign
from looplm.model.looped import LoopedLM

GOLDEN = Path(__file__).parent / "golden"
SYSTEM_OF = {
    "mythos_gqa": "openmythos",
    "mythos_mla": "openmythos",
    "nanochat_a": "nanochat",
    "nanochat_b": "nanochat",
    "osrt_v3_hra": "osrt",
    "osrt_v4": "osrt",
}


class Golden:
    """One file: weights, config and what the original computed."""

    def __init__(self, name: str) -> None:
        self.system = SYSTEM_OF[name]
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            self.config: dict[str, Any] = json.loads(file.metadata()["config"])
        self.weights = {key[2:]: tensor for key, tensor in tensors.items() if key.startswith("w.")}
        self.saved = {key: tensor for key, tensor in tensors.items() if not key.startswith("w.")}
        self.ids = self.saved["input_ids"]

    def load(self) -> LoopedLM:
        return load_foreign(self.system, self.weights, self.config)
