# RUN: --spec=deepseek_v3 --passes=assign-roles,insert-quantize
def model(x: "bf16[256, 512]", w: "frozen bf16[128, 512]"):
    return x @ w.t()


# CHECK-LABEL: graph model
# a frozen weight has a dgrad and no wgrad
# CHECK:       fp8c.scaled_mm({{.*}}) : bf16[256, 128]
# CHECK:       fp8c.scaled_mm({{.*}}) : bf16[256, 512]
# CHECK:       return [%{{\w+}}, None, %{{\w+}}]
# CHECK-NOT:   [128x1]
