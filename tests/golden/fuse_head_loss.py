# RUN: --spec=deepseek_v3 --passes=assign-roles,fuse-head-loss
import torch.nn.functional as F


def model(x: "bf16[256, 512]", labels: "i64[256] < 1024", w: "param bf16[1024, 512]"):
    return F.cross_entropy((x @ w.t()).float(), labels)


# CHECK-LABEL: graph model
# CHECK:       %[[T:\w+]] = input() : f32[]
# CHECK:       %[[F:\w+]] = fp8c.linear_cross_entropy({{.*}}, -100, True, True, True) : (f32[], bf16[256, 512], bf16[1024, 512])
# CHECK:       %[[LOSS:\w+]] = getitem(%[[F]], 0) : f32[]
# CHECK:       aten.mul.Tensor({{.*}}, %[[T]]) : bf16[1024, 512]
# CHECK:       aten.mul.Tensor({{.*}}, %[[T]]) : bf16[256, 512]
# CHECK:       return [%[[LOSS]], {{.*}}]
# CHECK-NOT:   [256, 1024]
