"""Hopper GEMMs in CUDA C++: block-scaled FP8 with FP32 promotion, dense and grouped (docs/hopper_gemm.md)."""
