"""Every diagnostic code with its explanation; `fp8c explain CODE` prints it. Codes are permanent: never reuse one.

E01xx syntax · E02xx conflicts · E03xx matching · E04xx hardware · E05xx data flow · E06xx files and versions ·
E07xx broken invariants · E08xx models · W.... warnings and R.... remarks use the same hundreds.
"""

from __future__ import annotations

EXPLANATIONS: dict[str, str] = {
    "E0420": "An fp8c operator ran on a device for which nothing implements it. Kernels are registered when their "
    "backend is imported: fp8c.backends.reference for the CPU, fp8c.decompositions for plain tensor operations on any "
    "device.",
    "E0421": "The format cannot be produced by fp8c::quantize: it is not a quantized format, or it asks for stochastic "
    "rounding or delayed scales, which no kernel implements.",
    "E0423": "The tensor-core model promotes after whole instructions of 32 elements of K; the promotion interval, or a group "
    "size along K, is no multiple of 32.",
    "E0520": "An fp8c operator got operands that do not fit it: rank, dtype, sizes, or scales of another group shape.",
    "E0521": "Expert offsets were given where groups cannot restart at each expert. Only groups of several rows (such as "
    "128x1) of a 2-D tensor cross expert boundaries; 1x128 groups need no offsets.",
    "E0522": "fp8c::attention computes no gradient for an additive mask, and the model asks for one (a learned bias).",
    "W0422": "No C compiler worked, so the exact model of the tensor core's accumulator runs in PyTorch: the same bits, several "
    "times slower. Install a C compiler or name one in the environment variable CC.",
}
