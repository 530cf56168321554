# RUN: --spec=deepseek_v3 --passes=assign-roles,insert-quantize,requantize-for-wgrad,choose-saved,partition
import torch.nn.functional as F


def model(x: "bf16[256, 512]", w: "param bf16[128, 512]", v: "param bf16[256, 128]"):
    return F.silu(x @ w.t()) @ v.t()


# CHECK-LABEL: graph model.forward
# CHECK:       %[[XP:\w+]] = fp8c.quantize(%primals_3, 'e4m3[1x128] fp32') : (e4m3[256, 512], f32[256, 4])
# CHECK-NEXT:  %[[XQ:\w+]] = getitem(%[[XP]], 0)
# CHECK-NEXT:  %[[XS:\w+]] = getitem(%[[XP]], 1)
# CHECK:       %[[H:\w+]] = fp8c.scaled_mm({{.*}}) : bf16[256, 128]
# CHECK-NEXT:  %[[A:\w+]] = aten.silu(%[[H]])
# CHECK-NEXT:  %[[AP:\w+]] = fp8c.quantize(%[[A]], {{.*}})
# CHECK-NEXT:  %[[AQ:\w+]] = getitem(%[[AP]], 0)
# CHECK-NEXT:  %[[AS:\w+]] = getitem(%[[AP]], 1)
# inputs of both GEMMs as FP8 pairs; silu's own input as it is; x and silu's output are not kept
# CHECK:       return (%{{\w+}}, %primals_1, %primals_2, %[[XQ]], %[[XS]], %[[H]], %[[AQ]], %[[AS]])
# CHECK-LABEL: graph model.backward
# CHECK:       aten.silu_backward(%{{\w+}}, %[[H]])
# CHECK-NOT:   aten.silu(
