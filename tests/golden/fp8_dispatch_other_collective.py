# RUN: --spec=deepseek_v3 --passes=assign-roles,insert-quantize,requantize-for-wgrad,fp8-dispatch
# An exchange that is no dispatch (its reader is an ordinary Linear, in another format than the payload) stays as it is.
import torch.distributed as dist
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.testing._internal.distributed.fake_pg import FakeStore

if not dist.is_initialized():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)


def model(x: "bf16[256, 256]", w: "param bf16[384, 256]"):
    return all_to_all_single_autograd(x, [128, 128], [128, 128], dist.group.WORLD) @ w.t()


# CHECK-LABEL: graph model
# CHECK:       _c10d_functional.all_to_all_single(%primals_2, {{.*}}) : bf16[256, 256]
# CHECK-NEXT:  %[[R:\w+]] = _c10d_functional.wait_tensor
# CHECK-NEXT:  fp8c.quantize(%[[R]], 'e4m3[1x128] fp32')
# CHECK:       _c10d_functional.all_to_all_single({{.*}}) : bf16[256, 256]
# CHECK-NOT:   = _c10d_functional.all_to_all_single
