# RUN: --spec=bf16 --target=h200 --passes=assign-roles,insert-quantize,requantize-for-wgrad,fp8-dispatch,choose-saved,partition,compress-saved,fuse-casts,fuse-combine
def model(x: "bf16[512, 128]", back: "i64[512] < 512", shared: "bf16[64, 128]", w: "param bf16[128, 128]"):
    rows = (x @ w)[back]
    return shared + rows.float().view(64, 8, 128).sum(1).to(rows.dtype)


# CHECK-LABEL: graph model.forward
# CHECK:       %[[Y:\w+]] = aten.mm(
# CHECK-NEXT:  %[[FLAT:\w+]] = aten.view(%{{\w+}}, [-1, 128]) : bf16[64, 128]
# CHECK-NEXT:  %[[Z:\w+]] = fp8c.gather_sum(%[[Y]], %{{\w+}}, 8, %[[FLAT]]) : bf16[64, 128]
# CHECK-NEXT:  return (%[[Z]]
# CHECK-NOT:   aten.sum
