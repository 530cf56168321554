# RUN: --spec=deepseek_v3 --target=h200 --passes=assign-roles,insert-quantize,requantize-for-wgrad,fp8-dispatch,choose-saved,partition,compress-saved,fuse-casts
import torch


def model(x: "bf16[256, 512]", gain: "param bf16[512]", w: "param bf16[128, 512]"):
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (gain * normed.to(x.dtype)) @ w.t()


# CHECK-LABEL: graph model.forward
# CHECK:       %[[N:\w+]] = fp8c.rms_norm_quantize(%{{\w+}}, %{{\w+}}, 1e-06, 'e4m3[1x128] fp32') : (e4m3[256, 512], f32[256, 4], f32[256, 1])
# CHECK-NEXT:  %[[Q:\w+]] = getitem(%[[N]], 0) : e4m3[256, 512]
# CHECK-NEXT:  %[[S:\w+]] = getitem(%[[N]], 1) : f32[256, 4]
# CHECK-NOT:   aten.rsqrt
# CHECK:       fp8c.scaled_mm(%[[Q]], %[[S]],
# CHECK:       return ({{.*}}%[[Q]], %[[S]]
# CHECK-LABEL: graph model.backward
# the norm's own gradient computes it again, as the spec says
# CHECK:       aten.rsqrt
