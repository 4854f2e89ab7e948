"""The form of a mapping table: Megatron's parameter names beside those of Hugging Face.

The tables have the names of Megatron's local layers. Those of Transformer Engine hold the two norms
in the linear layers behind them; all other names are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sod_mcore.student.conversion.layouts import Layout

_TRANSFORMER_ENGINE_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


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

    def in_layer(
        self, megatron_layer: int, hf_layer: int, implementation: str = "local"
    ) -> ParameterMapping:
        """A ``layer`` row with whole names; the layers are counted by stage and by model.

        Args:
            implementation: Megatron's ``transformer_impl``.
        """
        megatron_name = self.megatron_name
        if implementation == "transformer_engine":
            megatron_name = _TRANSFORMER_ENGINE_NAMES.get(megatron_name, megatron_name)
        return replace(
            self,
            megatron_name=f"decoder.layers.{megatron_layer}.{megatron_name}",
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
