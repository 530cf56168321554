# RUN: --spec=deepseek_v3 --passes=assign-roles,insert-quantize
import torch.nn.functional as F


def model(x: "bf16[256, 128]", w: "param bf16[4, 384, 128]", offs: "i32[4] < 64"):
    return F.grouped_mm(x, w.transpose(1, 2), offs=offs)


# CHECK-LABEL: graph model
# CHECK:       %[[OFFS:\w+]] = input() : i32[4]
# CHECK:       fp8c.quantize(%{{\w+}}, 'e4m3[128x128] fp32') : (e4m3[4, 384, 128], f32[4, 3, 1])
# CHECK:       fp8c.scaled_grouped_mm({{.*}}, %[[OFFS]], 'e4m3[1x128] fp32', 'e4m3[128x128] fp32', 128, bfloat16) : bf16[256, 384]
# groups along tokens restart at each expert: 256 // 128 + 4 of them
# CHECK:       fp8c.quantize(%{{\w+}}, 'e4m3[128x1] fp32', %[[OFFS]]) : (e4m3[768, 384], f32[6, 384])
# CHECK:       fp8c.quantize(%{{\w+}}, 'e4m3[128x1] fp32', %[[OFFS]]) : (e4m3[768, 128], f32[6, 128])
# CHECK:       fp8c.scaled_grouped_wgrad({{.*}}, %[[OFFS]], 'e4m3[1x128] fp32', 'e4m3[1x128] fp32', 128, bfloat16) : bf16[4, 384, 128]
# CHECK:       fp8c.scaled_grouped_mm({{.*}}, %[[OFFS]], 'e4m3[1x128] fp32', 'e4m3[128x128] fp32', 128, bfloat16) : bf16[256, 128]
# CHECK-NOT:   aten._grouped_mm
