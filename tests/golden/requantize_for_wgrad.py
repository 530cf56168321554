# RUN: --spec=deepseek_v3 --passes=assign-roles,insert-quantize,requantize-for-wgrad
def model(x: "bf16[256, 512]", w: "param bf16[128, 512]"):
    return x @ w.t()


# CHECK-LABEL: graph model
# CHECK:       %[[XP:\w+]] = fp8c.quantize(%[[X:\w+]], 'e4m3[1x128] fp32') : (e4m3[256, 512], f32[256, 4])
# CHECK-NEXT:  %[[XQ:\w+]] = getitem(%[[XP]], 0)
# CHECK-NEXT:  %[[XS:\w+]] = getitem(%[[XP]], 1)
# CHECK:       %[[R:\w+]] = fp8c.requantize(%[[XQ]], %[[XS]], 'e4m3[1x128] fp32', 'e4m3[128x1] fp32', None, None) : (e4m3[256, 512], f32[2, 512])
# CHECK-NEXT:  %[[RQ:\w+]] = getitem(%[[R]], 0)
# CHECK:       %[[RT:\w+]] = aten.permute(%[[RQ]], [1, 0])
# CHECK:       fp8c.scaled_mm({{.*}}, %[[RT]], {{.*}}) : bf16[128, 512]
# dy is quantized twice from BF16: it is at hand in backward
# CHECK:       fp8c.quantize(%tangents_1, 'e4m3[1x128] fp32')
# CHECK-NOT:   fp8c.quantize(%[[X]]
