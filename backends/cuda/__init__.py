"""Hopper GEMMs in CUDA C++: block-scaled FP8 with FP32 promotion, dense and grouped (docs/hopper_gemm.md).

`gemm.py` has them under the names and with the arguments of `fp8c::scaled_mm`, `scaled_grouped_mm`, `scaled_grouped_wgrad`
and the forms that add to an FP32 tensor; `backends.gemms` calls them. Nothing is compiled, and no GPU is touched, before
the first call.
"""
