# RUN: --spec=deepseek_v3 --passes=causal-attention
import torch
import torch.nn.functional as F


def model(q: "bf16[1, 2, 128, 64]", k: "bf16[1, 2, 128, 64]", v: "bf16[1, 2, 128, 64]"):
    positions = torch.arange(128)
    mask = positions[None, :] <= positions[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


# CHECK-LABEL: graph model
# CHECK:       %[[P:\w+]] = fp8c.attention({{.*}}, None, True, None, False) : (bf16[1, 2, 128, 64], f32[1, 2, 128])
# CHECK:       fp8c.attention_backward({{.*}}, None, True, None, False)
# CHECK-NOT:   aten.arange
