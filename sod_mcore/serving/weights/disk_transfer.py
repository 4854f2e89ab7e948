"""Weights by way of a folder that the engines read themselves; serves any engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sod_mcore.serving.client.engine_client import EngineClient
from sod_mcore.serving.endpoints import ModelEndpoints
from sod_mcore.serving.weights.transfer import WeightUpdateError, post_to_all


@dataclass(frozen=True)
class DiskTransfer:
    """A Hugging Face folder of the served architecture.

    Attributes:
        folder: the engines must see it under the same path.
    """

    folder: Path

    def check(self, endpoints: ModelEndpoints) -> None:
        """Refuse what SGLang 0.5.23 would die of: a weight file that is cut off ends the engine."""
        files = sorted(self.folder.glob("*.safetensors"))
        if not (self.folder / "config.json").is_file() or not files:
            raise WeightUpdateError(
                f"{self.folder} lacks config.json or *.safetensors; export it again"
            )
        for file in files:
            try:
                with safe_open(file, framework="np"):  # reads the header, which holds the size
                    pass
            except SafetensorError as error:
                raise WeightUpdateError(f"{file} is damaged ({error}); export it again") from error

    async def send(
        self, client: EngineClient, endpoints: ModelEndpoints, version: int, *, flush_cache: bool
    ) -> None:
        """Let every engine load the folder."""
        request = {
            "model_path": str(self.folder.resolve()),
            "weight_version": str(version),
            "flush_cache": flush_cache,
        }
        await post_to_all(client, endpoints.engines, "update_weights_from_disk", request)
