# RUN: --spec=deepseek_v3 --passes=assign-roles,insert-quantize,requantize-for-wgrad,fp8-dispatch
# Two ranks exchange tokens, run their experts, and exchange the results.
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.testing._internal.distributed.fake_pg import FakeStore

if not dist.is_initialized():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)


def model(x: "bf16[256, 128]", up: "param bf16[4, 256, 128]", down: "param bf16[4, 128, 128]", offs: "i32[4] < 64"):
    received = all_to_all_single_autograd(x, [128, 128], [128, 128], dist.group.WORLD)
    gate, value = F.grouped_mm(received, up.transpose(1, 2), offs=offs).chunk(2, -1)
    y = F.grouped_mm(F.silu(gate) * value, down.transpose(1, 2), offs=offs)
    return all_to_all_single_autograd(y, [128, 128], [128, 128], dist.group.WORLD)


# CHECK-LABEL: graph model
# dispatch: payload as bytes, scales beside it
# CHECK:       fp8c.quantize(%primals_3, 'e4m3[1x128] pow2')
# CHECK:       _c10d_functional.all_to_all_single({{.*}}) : u8[256, 128]
# CHECK:       %[[Q:\w+]] = aten.view.dtype({{.*}}, float8_e4m3fn) : e4m3[256, 128]
# CHECK:       _c10d_functional.all_to_all_single({{.*}}) : f32[256, 1]
# CHECK-NEXT:  %[[S:\w+]] = _c10d_functional.wait_tensor
# CHECK:       fp8c.scaled_grouped_mm(%[[Q]], %[[S]], {{.*}}) : bf16[256, 256]
# combine stays in BF16
# CHECK:       _c10d_functional.all_to_all_single({{.*}}) : bf16[256, 128]
# its backward is a dispatch of gradients; wgrad reads the same payload
# CHECK:       _c10d_functional.all_to_all_single({{.*}}) : u8[256, 128]
# CHECK:       %[[DQ:\w+]] = aten.view.dtype({{.*}}, float8_e4m3fn) : e4m3[256, 128]
# CHECK:       _c10d_functional.all_to_all_single({{.*}}) : f32[256, 1]
# CHECK-NEXT:  %[[DS:\w+]] = _c10d_functional.wait_tensor
# CHECK:       fp8c.requantize(%[[DQ]], %[[DS]], 'e4m3[1x128] pow2', 'e4m3[128x1] pow2', %primals_4, None)
# CHECK:       fp8c.scaled_grouped_mm(%[[DQ]], %[[DS]], {{.*}})
# CHECK:       fp8c.requantize(%[[Q]], %[[S]], {{.*}})
# the backward of dispatch is a combine: BF16
# CHECK:       _c10d_functional.all_to_all_single({{.*}}) : bf16[256, 128]
# CHECK-NOT:   = _c10d_functional.all_to_all_single
