"""The form of a mapping table: Megatron's parameter names beside those of Hugging Face."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sod_mcore.student.conversion.layouts import Layout


@dataclass(frozen=True)
class ParameterMapping:
    """One Megatron parameter.

    Attributes:
        megatron_name: name within a pipeline stage's GPTModel; in a table's ``layer`` rows, within
            the layer.
        hf_names: the Hugging Face tensors it is made of, in the layout's order.
        layout: how it is cut from them and put together again.
    """

    megatron_name: str
    hf_names: tuple[str, ...]
    layout: Layout

    def in_layer(self, megatron_layer: int, hf_layer: int) -> ParameterMapping:
        """A ``layer`` row with whole names; the layers are counted by stage and by model."""
        return replace(
            self,
            megatron_name=f"decoder.layers.{megatron_layer}.{self.megatron_name}",
            hf_names=tuple(f"model.layers.{hf_layer}.{name}" for name in self.hf_names),
        )


@dataclass(frozen=True)
class FamilyTable:
    """All parameters of a model family.

    Attributes:
        embedding: on the first stage.
        layer: of each transformer layer.
        final_norm: on the last stage.
        output_layer: on the last stage, where embeddings are not tied.
    """

    embedding: ParameterMapping
    layer: tuple[ParameterMapping, ...]
    final_norm: ParameterMapping
    output_layer: ParameterMapping

    def with_layer_rows(self, *rows: ParameterMapping) -> FamilyTable:
        """The table of a family that has further parameters in each layer."""
        return replace(self, layer=(*self.layer, *rows))
