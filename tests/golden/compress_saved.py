# RUN: --spec=deepseek_v3 --passes=assign-roles,insert-quantize,requantize-for-wgrad,fp8-dispatch,choose-saved,partition,compress-saved
import torch.nn.functional as F


def model(x: "bf16[256, 128]", up: "param bf16[4, 256, 128]", down: "param bf16[4, 128, 128]", offs: "i32[4] < 64"):
    gate, value = F.grouped_mm(x, up.transpose(1, 2), offs=offs).chunk(2, -1)
    return F.grouped_mm(F.silu(gate) * value, down.transpose(1, 2), offs=offs)


# CHECK-LABEL: graph model.forward
# CHECK:       %[[H:\w+]] = fp8c.scaled_grouped_mm({{.*}}) : bf16[256, 256]
# CHECK-NEXT:  %[[P:\w+]] = fp8c.quantize(%[[H]], 'e4m3[1x128] fp32') : (e4m3[256, 256], f32[256, 2])
# CHECK-NEXT:  %[[Q:\w+]] = getitem(%[[P]], 0)
# CHECK-NEXT:  %[[S:\w+]] = getitem(%[[P]], 1)
# the forward itself goes on with BF16
# CHECK:       aten.split.Tensor(%[[H]], 128, -1)
# CHECK:       return ({{.*}}, %[[Q]], %[[S]])
# CHECK-LABEL: graph model.backward
# CHECK-DAG:   %[[Q]] = input() : e4m3[256, 256]
# CHECK-DAG:   %[[S]] = input() : f32[256, 2]
# SwiGLU is computed again from them, and quantized for the second GEMM's wgrad
# CHECK:       %[[D:\w+]] = fp8c.dequantize(%[[Q]], %[[S]], 'e4m3[1x128] fp32', bfloat16, None, None) : bf16[256, 256]
# CHECK-NEXT:  aten.split.Tensor(%[[D]], 128, -1)
# CHECK:       %[[A:\w+]] = aten.mul.Tensor
# CHECK-NEXT:  fp8c.quantize(%[[A]], 'e4m3[128x1] fp32', %{{\w+}})
