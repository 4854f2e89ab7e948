"""Refuses tensors that an engine would die of, or would drop without a word.

SGLang 0.5.23 does not check what ``/update_weights_from_tensor`` brings: a wrong shape, or the name
of a layer that it lacks, ends its scheduler and with it the engine; another unknown name is
ignored; a value that is not finite is loaded. What it can load stands in the folder that it was
started from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sod_mcore.serving.endpoints import ModelEndpoints
from sod_mcore.serving.weights.transfer import WeightUpdateError

Bucket = Sequence[tuple[str, torch.Tensor]]
"""Tensors under Hugging Face names."""

Shapes = Mapping[str, tuple[int, ...]]

OUTPUT_LAYER = "lm_head.weight"
BUFFER_SUFFIX = "rotary_emb.inv_freq"


def engine_shapes(endpoints: ModelEndpoints) -> Shapes:
    """Name and shape of every tensor that the engines of a model take.

    They come from the headers of the folder's safetensors files. With tied embeddings the output
    layer is none of them: the engine takes it from ``model.embed_tokens.weight``.

    Raises:
        WeightUpdateError: the folder cannot be read here, or holds no safetensors files.
    """
    folder = Path(endpoints.model_path)
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        config = json.loads((folder / "config.json").read_text())
    except (OSError, SafetensorError) as error:
        raise WeightUpdateError(
            f"{_purpose(endpoints)}, which cannot be read ({error}); {_MEND}"
        ) from error
    if not shapes:
        raise WeightUpdateError(f"{_purpose(endpoints)}, which has no *.safetensors; {_MEND}")
    if config.get("text_config", config).get("tie_word_embeddings", False):
        shapes.pop(OUTPUT_LAYER, None)
    return {name: shape for name, shape in shapes.items() if not name.endswith(BUFFER_SUFFIX)}


_MEND = "make it readable to the trainer, or set serving.weight_sync=disk"


def _purpose(endpoints: ModelEndpoints) -> str:
    return (
        "tensors that travel without a disk (serving.weight_sync) are compared with the engine's "
        f"folder {endpoints.model_path}"
    )


def checked_buckets(buckets: Iterable[Bucket], shapes: Shapes) -> Iterator[Bucket]:
    """The same buckets, each checked by :func:`require_loadable` before it is yielded.

    Raises:
        WeightUpdateError: a tensor cannot be loaded, or one of the engine's is missing at the end.
    """
    missing = set(shapes)
    for bucket in buckets:
        require_loadable(bucket, shapes)
        missing -= {name for name, _ in bucket}
        yield bucket
    if missing:
        raise WeightUpdateError(
            f"{len(missing)} of the engine's weights were not sent, {min(missing)!r} among them"
        )


def require_loadable(bucket: Bucket, shapes: Shapes) -> None:
    """Check the tensors of a bucket before any of them is sent.

    Raises:
        WeightUpdateError: a name is unknown to the engine, a shape differs, or a value is not
            finite.
    """
    for name, tensor in bucket:
        if name not in shapes:
            raise WeightUpdateError(f"the engine has no weight {name!r}, so it would be lost")
        if tuple(tensor.shape) != shapes[name]:
            raise WeightUpdateError(
                f"{name} has shape {tuple(tensor.shape)}, in the engine {shapes[name]}"
            )
        # The smallest and the largest value, without a mask of the tensor's size; NaN is both.
        if not all(bound.isfinite() for bound in tensor.aminmax()):
            raise WeightUpdateError(f"{name} has values that are not finite")
