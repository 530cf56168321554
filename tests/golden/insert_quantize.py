# RUN: --spec=deepseek_v3 --passes=assign-roles,insert-quantize
def model(x: "bf16[256, 512]", w: "param bf16[128, 512]"):
    return x @ w.t()


# CHECK-LABEL: graph model
# CHECK:       %[[W:\w+]] = input(w) : bf16[128, 512]
# CHECK:       %[[X:\w+]] = input() : bf16[256, 512]
# CHECK:       %[[DY:\w+]] = input() : bf16[256, 128]
# CHECK:       %[[XP:\w+]] = fp8c.quantize(%[[X]], 'e4m3[1x128] fp32') : (e4m3[256, 512], f32[256, 4])
# CHECK-NEXT:  %[[XQ:\w+]] = getitem(%[[XP]], 0)
# CHECK-NEXT:  %[[XS:\w+]] = getitem(%[[XP]], 1)
# CHECK:       %[[WP:\w+]] = fp8c.quantize(%[[W]], 'e4m3[128x128] fp32') : (e4m3[128, 512], f32[1, 4])
# CHECK-NEXT:  %[[WQ:\w+]] = getitem(%[[WP]], 0)
# CHECK-NEXT:  %[[WS:\w+]] = getitem(%[[WP]], 1)
# CHECK:       %[[Y:\w+]] = fp8c.scaled_mm(%[[XQ]], %[[XS]], %[[WQ]], %[[WS]], 'e4m3[1x128] fp32', 'e4m3[128x128] fp32', 128, bfloat16) : bf16[256, 128]
# wgrad: both operands in groups along tokens
# CHECK:       fp8c.quantize(%[[DY]], 'e4m3[128x1] fp32')
# CHECK:       fp8c.quantize(%[[X]], 'e4m3[128x1] fp32')
# CHECK:       fp8c.scaled_mm({{.*}}'e4m3[1x128] fp32', 'e4m3[1x128] fp32', 128, bfloat16) : bf16[128, 512]
# dgrad: the forward's quantized weight, transposed
# CHECK:       fp8c.quantize(%[[DY]], 'e4m3[1x128] fp32')
# CHECK:       %[[WQT:\w+]] = aten.permute(%[[WQ]], [1, 0])
# CHECK:       %[[WST:\w+]] = aten.permute(%[[WS]], [1, 0])
# CHECK:       fp8c.scaled_mm({{.*}}, %[[WQT]], %[[WST]], 'e4m3[1x128] fp32', 'e4m3[128x128] fp32', 128, bfloat16) : bf16[256, 512]
# CHECK:       return [%[[Y]],
# CHECK-NOT:   aten.mm
