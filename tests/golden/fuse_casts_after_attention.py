# RUN: --spec=deepseek_v3 --target=h200 --passes=assign-roles,insert-quantize,requantize-for-wgrad,fp8-dispatch,choose-saved,partition,compress-saved,fuse-casts
import torch.nn.functional as F


def model(q: "bf16[1, 4, 256, 64]", k: "bf16[1, 4, 256, 64]", v: "bf16[1, 4, 256, 64]", w: "param bf16[128, 256]"):
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).reshape(256, 256) @ w.t()


# attention's own backward needs its output in BF16: wgrad's codes are made from that, not unpacked a second time
# CHECK-LABEL: graph model.backward
# CHECK:       %[[O:\w+]] = fp8c.dequantize(%[[Q:\w+]], %[[S:\w+]], 'e5m6[1x128] pow2', bfloat16, None, 256) : bf16[256, 256]
# CHECK-NEXT:  fp8c.quantize(%[[O]], 'e4m3[128x1] pow2') : (e4m3[256, 256], f32[2, 256])
# CHECK-NOT:   fp8c.requantize
# CHECK-NOT:   fp8c.dequantize
# CHECK:       fp8c.attention_backward
