// Runs CUDA sources without a card: the threads of a block are coroutines that take turns, and change at barriers and
// at exchanges between the threads of a warp. Slow and exact; blocks run one after the other. Memory that kernels share
// holds NaN until it is written.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(threads)
#define HOST_DEVICE
#define SHARED_FLOATS(name) float* name = emulator::block->shared.data()
#define LAUNCH(kernel, grid, threads, shared, stream, ...) \
    emulator::launch([=] { kernel(__VA_ARGS__); }, dim3(grid), threads, shared)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, gridDim;

namespace emulator {

struct Barrier {
    int members = 0, arrived = 0;
    long generation = 0;
};

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
};

struct Warp {
    Barrier barrier;
    float exchanged[2][32];
    int turn[32] = {};
};

struct Block {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<float> shared;
    Barrier barrier;
    ucontext_t scheduler;
    unsigned current;
};

inline Block* block = nullptr;
inline const void* running = nullptr;
inline void (*call)(const void*) = nullptr;

inline void wait(Barrier& barrier) {
    const long generation = barrier.generation;
    if (++barrier.arrived == barrier.members) {
        barrier.arrived = 0;
        barrier.generation++;
    }
    while (barrier.generation == generation) {
        const unsigned me = block->current;
        swapcontext(&block->threads[me].context, &block->scheduler);
    }
}

inline void run_thread() {
    call(running);
    block->threads[block->current].done = true;
}

template <class F>
void launch(F kernel, dim3 grid, unsigned count, size_t shared_bytes) {
    Block b;
    block = &b;
    running = &kernel;
    call = [](const void* f) { (*static_cast<const F*>(f))(); };
    gridDim = grid;
    for (unsigned i = 0; i < grid.x * grid.y * grid.z; i++) {
        blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
        b.threads = std::vector<Thread>(count);
        b.warps = std::vector<Warp>((count + 31) / 32);
        b.shared.assign(shared_bytes / sizeof(float), NAN);
        b.barrier = Barrier{(int)count};
        for (unsigned w = 0; w < b.warps.size(); w++) b.warps[w].barrier.members = count - w * 32 < 32 ? count - w * 32 : 32;
        constexpr size_t STACK = 1 << 17;
        for (Thread& t : b.threads) {
            t.stack.reset(new char[STACK]);
            getcontext(&t.context);
            t.context.uc_stack.ss_sp = t.stack.get();
            t.context.uc_stack.ss_size = STACK;
            t.context.uc_link = &b.scheduler;
            makecontext(&t.context, run_thread, 0);
        }
        for (bool left = true; left;) {
            left = false;
            for (b.current = 0; b.current < count; b.current++) {
                if (b.threads[b.current].done) continue;
                threadIdx = dim3(b.current);
                swapcontext(&b.scheduler, &b.threads[b.current].context);
                left = left || !b.threads[b.current].done;
            }
        }
        if (b.barrier.arrived) throw std::runtime_error("some threads of a block wait for others that have ended");
    }
    block = nullptr;
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::block->barrier); }

// Two rooms in turns: whoever is in the next exchange has read what it needs of this one.
inline float __shfl_xor_sync(unsigned, float x, int apart) {
    const unsigned me = emulator::block->current, lane = me % 32;
    emulator::Warp& warp = emulator::block->warps[me / 32];
    float* room = warp.exchanged[warp.turn[lane]++ % 2];
    room[lane] = x;
    emulator::wait(warp.barrier);
    return room[lane ^ apart];
}

namespace scan {
inline const char* launch_error() { return nullptr; }
}  // namespace scan
