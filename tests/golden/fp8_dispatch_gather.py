# RUN: --spec=deepseek_v3 --passes=assign-roles,insert-quantize,requantize-for-wgrad,fp8-dispatch
import torch.nn.functional as F


def model(x: "bf16[128, 256]", w: "param bf16[4, 384, 256]", rows: "i64[256] < 128", offs: "i32[4] < 64"):
    return F.grouped_mm(x[rows], w.transpose(1, 2), offs=offs)


# CHECK-LABEL: graph model
# CHECK:       %[[X:\w+]] = input() : bf16[128, 256]
# CHECK:       %[[ROWS:\w+]] = input() : i64[256]
# the token is quantized, its copies are gathered as payload and scales
# CHECK:       %[[P:\w+]] = fp8c.quantize(%[[X]], 'e4m3[1x128] fp32') : (e4m3[128, 256], f32[128, 2])
# CHECK-NEXT:  %[[Q:\w+]] = getitem(%[[P]], 0)
# CHECK-NEXT:  %[[S:\w+]] = getitem(%[[P]], 1)
# CHECK-NEXT:  %[[QG:\w+]] = aten.index.Tensor(%[[Q]], [%[[ROWS]]]) : e4m3[256, 256]
# CHECK-NEXT:  %[[SG:\w+]] = aten.index.Tensor(%[[S]], [%[[ROWS]]]) : f32[256, 2]
# CHECK:       fp8c.scaled_grouped_mm(%[[QG]], %[[SG]], {{.*}}) : bf16[256, 384]
# CHECK:       fp8c.requantize(%[[QG]], %[[SG]], {{.*}})
# CHECK-NOT:   aten.index.Tensor(%[[X]]
