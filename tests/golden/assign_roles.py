# RUN: --spec=deepseek_v3 --passes=assign-roles --provenance
import torch.nn.functional as F


def model(x: "bf16[128, 256]", gate: "param bf16[384, 256]", up: "param bf16[384, 256]", down: "param bf16[256, 384]"):
    return (F.silu(x @ gate.t()) * (x @ up.t())) @ down.t()


# CHECK-LABEL: graph model
# CHECK:       aten.mm({{.*}}) : bf16[128, 384] # fprop gate assign_roles.py:{{[0-9]+}}
# CHECK:       aten.mm({{.*}}) : bf16[128, 384] # fprop up assign_roles.py:{{[0-9]+}}
# CHECK-NEXT:  aten.mul.Tensor({{.*}}) : bf16[128, 384] # :swiglu
# CHECK:       aten.mm({{.*}}) : bf16[128, 256] # fprop down
# CHECK:       aten.mm({{.*}}) : bf16[256, 384] # wgrad down
# CHECK:       aten.mm({{.*}}) : bf16[128, 384] # dgrad down
# CHECK:       aten.mm({{.*}}) : bf16[384, 256] # wgrad up
# CHECK:       aten.mm({{.*}}) : bf16[128, 256] # dgrad up
# CHECK:       aten.mm({{.*}}) : bf16[384, 256] # wgrad gate
# CHECK:       aten.mm({{.*}}) : bf16[128, 256] # dgrad gate
