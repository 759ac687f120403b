"""OPT: learned positions, layer norm, ReLU MLP, biases everywhere."""

from losa_deploy.families.base import Family

FAMILY = Family(
    name="opt",
    model_types=("opt",),
    blocks="model.decoder.layers",
    linears=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    ),
    embedding="model.decoder.embed_tokens",
    final_norm="model.decoder.final_layer_norm",
    onnx_graph="transformers",
)
