# RUN: --spec=bf16 --passes=assign-roles,insert-quantize,requantize-for-wgrad,fp8-dispatch
def model(x: "bf16[256, 512]", w: "param bf16[128, 512]"):
    return x @ w.t()


# CHECK-LABEL: graph model
# CHECK:       aten.mm({{.*}}) : bf16[256, 128]
# CHECK:       aten.mm({{.*}}) : bf16[128, 512]
# CHECK:       aten.mm({{.*}}) : bf16[256, 512]
# CHECK-NOT:   fp8c
