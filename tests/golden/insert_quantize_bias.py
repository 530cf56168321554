# RUN: --spec=deepseek_v3 --passes=assign-roles,insert-quantize
import torch.nn.functional as F


def model(x: "bf16[256, 512]", w: "param bf16[128, 512]", b: "param bf16[128]"):
    return F.linear(x, w, b)


# CHECK-LABEL: graph model
# CHECK:       %[[B:\w+]] = input(b) : bf16[128]
# CHECK:       %[[Y:\w+]] = fp8c.scaled_mm({{.*}}) : bf16[256, 128]
# CHECK-NEXT:  %[[OUT:\w+]] = aten.add.Tensor(%[[Y]], %[[B]]) : bf16[256, 128]
# CHECK:       aten.sum.dim_IntList(%tangents_1, [0], True)
# CHECK:       return [%[[OUT]],
# CHECK-NOT:   aten.addmm
