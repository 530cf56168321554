# RUN: --spec=deepseek_v3 --target=h200 --passes=assign-roles,insert-quantize,requantize-for-wgrad,fp8-dispatch,choose-saved,partition,compress-saved,fuse-casts
import torch.nn.functional as F


def model(
    x: "bf16[128, 128]",
    rows: "i64[256] < 128",
    up: "param bf16[4, 256, 128]",
    down: "param bf16[4, 128, 128]",
    offs: "i32[4] < 64",
):
    gate, value = F.grouped_mm(x[rows], up.transpose(1, 2), offs=offs).chunk(2, -1)
    return F.grouped_mm(F.silu(gate) * value, down.transpose(1, 2), offs=offs)


# CHECK-LABEL: graph model.forward
# CHECK:       %[[Q:\w+]] = getitem(%{{\w+}}, 0) : e4m3[128, 128]
# CHECK-NEXT:  %[[S:\w+]] = getitem(%{{\w+}}, 1) : f32[128, 1]
# CHECK-NEXT:  %[[G:\w+]] = fp8c.gather_quantized(%[[Q]], %[[S]], %[[ROWS:\w+]], 'e4m3[1x128] pow2') : (e4m3[256, 128], f32[256, 1])
# CHECK-NOT:   aten.index
# CHECK:       return ({{.*}}%[[Q]], %[[S]]
# CHECK-LABEL: graph model.backward
# both directions of the gradient from one read, the second restarting at each expert
# CHECK:       fp8c.quantize_both(%[[DY:\w+]], 'e4m3[1x128] pow2', 'e4m3[128x1] pow2', %[[OFFS:\w+]]) : (e4m3[256, 128], f32[256, 1], e4m3[768, 128], f32[6, 128])
# dgrad reads the weight with its reduction innermost
# CHECK:       %[[W:\w+]] = fp8c.quantize_transposed(%{{\w+}}, 'e4m3[128x128] fp32')
# CHECK-NEXT:  %[[D:\w+]] = getitem(%[[W]], 0)
# CHECK:       fp8c.scaled_grouped_mm(%{{\w+}}, %{{\w+}}, %[[D]],
# CHECK:       fp8c.gather_requantized(%[[Q]], %[[S]], %[[ROWS]], 'e4m3[1x128] pow2', 'e4m3[128x1] pow2', %[[OFFS]])
