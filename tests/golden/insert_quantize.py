# RUN: --spec=deepseek_v3 --passes=assign-roles,insert-quantize
def model(x: "bf16[256, 512]", w: "param bf16[128, 512]"):
    return x @ w.t()


# CHECK-LABEL: graph model
