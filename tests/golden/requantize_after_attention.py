# RUN: --spec=deepseek_v3 --passes=assign-roles,insert-quantize,requantize-for-wgrad
import torch.nn.functional as F


def model(q: "bf16[1, 4, 256, 64]", k: "bf16[1, 4, 256, 64]", v: "bf16[1, 4, 256, 64]", w: "param bf16[128, 256]"):
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).reshape(256, 256) @ w.t()


# CHECK-LABEL: graph model
# CHECK:       %[[O:\w+]] = aten.view(%{{\w+}}, [256, 256]) : bf16[256, 256]
# twelve bits for backward, eight for the GEMM: 256 columns of E5M6 are 384 bytes
# CHECK-DAG:   %[[EP:\w+]] = fp8c.quantize(%[[O]], 'e5m6[1x128] pow2') : (u8[256, 384], f32[256, 2])
# CHECK-DAG:   fp8c.quantize(%[[O]], 'e4m3[1x128] pow2') : (e4m3[256, 256], f32[256, 2])
# CHECK:       fp8c.requantize({{.*}}, 'e5m6[1x128] pow2', 'e4m3[128x1] pow2', None, 256) : (e4m3[256, 256], f32[2, 256])
# CHECK:       fp8c.attention_backward
