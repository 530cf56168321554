# RUN: --spec=deepseek_v3 --passes=assign-roles,insert-quantize
def model(x: "bf16[256, 512]", w: "param bf16[512, 128]"):
    return x @ w


# CHECK-LABEL: graph model
# the weight is quantized as it is stored; the forward reads it transposed, dgrad as it is
# CHECK:       %[[W:\w+]] = input(w) : bf16[512, 128]
# CHECK:       %[[WP:\w+]] = fp8c.quantize(%[[W]], 'e4m3[128x128] fp32') : (e4m3[512, 128], f32[4, 1])
# CHECK-NEXT:  %[[WQ:\w+]] = getitem(%[[WP]], 0)
# CHECK-NEXT:  %[[WS:\w+]] = getitem(%[[WP]], 1)
# CHECK:       %[[WQT:\w+]] = aten.permute(%[[WQ]], [1, 0]) : e4m3[128, 512]
# CHECK:       fp8c.scaled_mm({{.*}}%[[WQT]], {{.*}}) : bf16[256, 128]
# CHECK:       fp8c.scaled_mm({{.*}}) : bf16[512, 128]
# CHECK:       fp8c.scaled_mm({{.*}}, %[[WQ]], %[[WS]], {{.*}}) : bf16[256, 512]
# CHECK-NOT:   aten.mm
