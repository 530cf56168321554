// Thin names for the Hopper instructions that the GEMM uses and CUDA C++ has no words for. PTX ISA 8.x, sm_90a.
#pragma once

using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;

// The driver's 128-byte tensor map, opaque here. NVRTC has no cuda.h at hand, so it is declared instead of included.
struct alignas(64) TensorMap {
    uint64 opaque[16];
};

#define DEVICE __device__ __forceinline__

DEVICE uint32 shared_address(const void* p) { return static_cast<uint32>(__cvta_generic_to_shared(p)); }

// A value that is the same in all lanes: the compiler may then keep it, and what follows from it, in uniform registers.
DEVICE uint32 uniform(uint32 x) { return __shfl_sync(0xffffffffu, x, 0); }

// True in one lane of the warp. Unlike `lane == 0`, it tells the compiler that there is only one: around each TMA
// instruction it then needs no loop over active lanes.
DEVICE bool elect_one() {
    uint32 elected;
    asm volatile("{\n\t.reg .pred p;\n\telect.sync _|p, 0xffffffff;\n\tselp.u32 %0, 1, 0, p;\n\t}" : "=r"(elected));
    return elected != 0;
}

// threadIdx.x and gridDim.x, read afresh: they and what is computed from them take no registers over the loops in between.
DEVICE uint32 thread_index_again() {
    uint32 x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

DEVICE uint32 grid_blocks_again() {
    uint32 x;
    asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(x));
    return x;
}

// The value itself; but what is computed from it is computed here, not held from before a loop.
DEVICE int again(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

// Barriers in shared memory --------------------------------------------------------------------------------------

DEVICE void barrier_init(uint32 barrier, uint32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
// Makes the initialised barriers visible to the copy engine; the thread that initialised them runs it.
DEVICE void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async;" ::: "memory");
}
DEVICE void barrier_arrive(uint32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
DEVICE void barrier_arrive(uint32 barrier, uint32 count) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// The same barrier of another block of the cluster. Without .release.cluster, which would cost a fence each time: the
// arrival only says that reads are over.
DEVICE void barrier_arrive_remote(uint32 barrier, uint32 block, uint32 count = 1) {
    asm volatile(
        "{\n\t.reg .b32 remote;\n\tmapa.shared::cluster.u32 remote, %0, %1;\n\t"
        "mbarrier.arrive.shared::cluster.b64 _, [remote], %2;\n\t}" ::"r"(barrier), "r"(block), "r"(count) : "memory");
}
// The same in two steps, for who arrives at one block's barriers again and again.
DEVICE uint32 remote_address(uint32 address, uint32 block) {
    uint32 remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(block));
    return remote;
}
DEVICE void barrier_arrive_at(uint32 remote) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory");
}
DEVICE void barrier_arrive_expect(uint32 barrier, uint32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void barrier_wait(uint32 barrier, uint32 parity) {
    asm volatile(
        "{\n\t.reg .pred done;\n"
        "again:\n\tmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
        "@done bra passed;\n\tbra again;\n"
        "passed:\n\t}" ::"r"(barrier), "r"(parity) : "memory");
}
// The same for a thread that waits long and has time: it sleeps until the phase ends (10 ms at most) instead of asking again every hundred
// clocks or so, each time with some instructions and an access to shared memory.
DEVICE void barrier_wait_asleep(uint32 barrier, uint32 parity) {
    asm volatile(
        "{\n\t.reg .pred done;\n"
        "again:\n\tmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, %2;\n\t"
        "@done bra passed;\n\tbra again;\n"
        "passed:\n\t}" ::"r"(barrier), "r"(parity), "r"(10000000) : "memory");
}
// All warps of one warpgroup; hardware barrier 0 is __syncthreads's.
DEVICE void warpgroup_sync(uint32 warpgroup) { asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory"); }
// Orders this thread's ordinary accesses to shared memory before later ones of the copy engine and the tensor core.
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The copy engine (TMA) ------------------------------------------------------------------------------------------

DEVICE void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
DEVICE void load_tile(uint32 destination, const TensorMap& map, uint32 barrier, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            destination), "l"(&map), "r"(barrier), "r"(x), "r"(y) : "memory");
}
// To the same place in both blocks of a cluster of two, and to the same barrier in each.
DEVICE void load_tile_to_both(uint32 destination, const TensorMap& map, uint32 barrier, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(destination), "l"(&map), "r"(barrier), "r"(x), "r"(y),
        "h"(static_cast<uint16>(3)) : "memory");
}
DEVICE void store_tile(const TensorMap& map, uint32 source, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
                 "r"(source), "r"(x), "r"(y), "r"(z) : "memory");
}
DEVICE void add_tile(const TensorMap& map, uint32 source, int x, int y, int z) {
    asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
                 "r"(source), "r"(x), "r"(y), "r"(z) : "memory");
}
DEVICE void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most `pending` of this thread's store groups still read shared memory.
template <int pending>
DEVICE void wait_stores_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

// Clusters -------------------------------------------------------------------------------------------------------

DEVICE uint32 cluster_rank() {
    uint32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Programmatic dependent launch: start the next grid's prologue early; touch no global memory before the last is done.
DEVICE void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
DEVICE void wait_for_previous_grid() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Shared memory --------------------------------------------------------------------------------------------------

DEVICE float load_shared(uint32 address) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address));
    return v;
}
DEVICE float2 load_shared2(uint32 address) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address));
    return v;
}
DEVICE int4 load_shared4(uint32 address) {
    int4 v;
    asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}
DEVICE void store_shared(uint32 address, float x) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}
DEVICE void store_shared4(uint32 address, int4 v) {
    asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
// Four 8x8 matrices of 16-bit elements (here: pairs of FP8); lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void load_matrices(uint32 (&r)[4], uint32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}
DEVICE void store_matrices4(uint32 address, uint32 a, uint32 b, uint32 c, uint32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
                 "r"(c), "r"(d) : "memory");
}
DEVICE void store_matrices2(uint32 address, uint32 a, uint32 b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}
// Two FP32 as packed BF16, round to nearest even, `low` in the low half.
DEVICE uint32 pack_bf16(float low, float high) {
    uint32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
DEVICE void add_global(float* address, float value) {
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(address), "f"(value) : "memory");
}

// Tensor core ----------------------------------------------------------------------------------------------------

// Descriptor of a K-major operand tile of 128-byte rows under TMA's 128-byte swizzle (PTX ISA, "matrix descriptor"):
// bits 0-13 address / 16, bits 32-45 distance of 8-row groups / 16, bits 62-63 swizzle mode 1. Step k by adding bytes / 16.
constexpr uint64 DESCRIPTOR = (1ull << 62) | (static_cast<uint64>(1024 >> 4) << 32) | (1ull << 16);
DEVICE uint64 operand_descriptor(uint32 address) { return DESCRIPTOR | ((address & 0x3ffff) >> 4); }
// The same descriptor, anew from its lower half: a sum with a constant is then one instruction of the uniform data path instead of two.
DEVICE uint64 uniform_descriptor(uint64 descriptor) {
    uint32 lower = uniform(static_cast<uint32>(descriptor));
    asm volatile("" : "+r"(lower));
    return (DESCRIPTOR >> 32 << 32) | lower;
}
DEVICE void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// The tensor core reads and writes registers behind the compiler's back; this pins their uses to one side of it.
template <int count>
DEVICE void pin(float (&registers)[count]) {
#pragma unroll
    for (int i = 0; i < count; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int registers>
DEVICE void raise_register_limit() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
DEVICE void lower_register_limit() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
