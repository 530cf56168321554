# RUN: --spec=deepseek_v3 --passes=assign-roles,insert-quantize
def model(x: "bf16[2, 128, 512]", q: "param bf16[128, 512]", k: "param bf16[256, 512]"):
    return x @ q.t(), x @ k.t()


# CHECK-LABEL: graph model
# one quantize of x serves both GEMMs, although each reads a view of its own
# CHECK:       %[[XP:\w+]] = fp8c.quantize(%view, 'e4m3[1x128] fp32') : (e4m3[256, 512], f32[256, 4])
# CHECK-NEXT:  %[[XQ:\w+]] = getitem(%[[XP]], 0)
# CHECK:       fp8c.scaled_mm(%[[XQ]], {{.*}}) : bf16[256, 128]
# CHECK:       fp8c.scaled_mm(%[[XQ]], {{.*}}) : bf16[256, 256]
# CHECK:       fp8c.quantize(%{{\w+}}, 'e4m3[128x1] fp32') : (e4m3[256, 512], f32[2, 512])
# CHECK-NOT:   : (e4m3[256, 512], f32[2, 512])
