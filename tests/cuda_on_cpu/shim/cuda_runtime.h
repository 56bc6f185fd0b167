// Runs CUDA kernels on a CPU, compiled with g++ -std=c++20: one fiber per CUDA thread.
//
// Barriers and shuffles switch between the fibers of a block, in a selectable order (emu::order), so that a
// missing barrier changes results. Normally blocks run one after another, and __shared__ means static. With
// EMU_PARALLEL, which is for ThreadSanitizer, each block is an OS thread, several run in parallel, and __shared__ means
// thread_local. For ThreadSanitizer, atomics and fences have CUDA's semantics: an atomic orders nothing, __threadfence
// does.
#pragma once

#include <math.h>
#include <stdint.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <latch>
#include <mutex>
#include <random>
#include <source_location>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#define EMU_SWITCH_ASM
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#define EMU_NOSAN __attribute__((no_sanitize("thread")))
#define EMU_RELEASE(p) __tsan_release(p)
#define EMU_ACQUIRE(p) __tsan_acquire(p)
#else
#define EMU_NOSAN
#define EMU_RELEASE(p) ((void)0)
#define EMU_ACQUIRE(p) ((void)0)
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// Types and keywords -------------------------------------------------------------------------------------------------

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __forceinline__ inline
#ifdef EMU_PARALLEL
#define __shared__ thread_local
#else
#define __shared__ static
#endif

namespace emu {

using Site = std::source_location;

struct Block;

// A meeting point of threads. A thread waits until the generation changes.
struct Barrier {
  unsigned generation = 0, arrived = 0;
  Site site;
  char token[2] = {};         // of even and odd generations, for ThreadSanitizer
  char slot[2][32][16] = {};  // values that lanes exchange
};

struct Thread {
  uint3 index;
  unsigned number;
  Block* block;
  Barrier* waits_at = nullptr;
  unsigned waits_in = 0;
  Site site;
  bool done = false, fenced = false;
  const void* touched[8];  // atomics since the last fence
  unsigned num_touched = 0;
#ifdef EMU_SWITCH_ASM
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* stack = nullptr;
  void* fake_stack = nullptr;
  void* fiber = nullptr;
};

struct Launch {
  dim3 blocks, threads;
  const std::function<void()>* body;
  char token = 0;
  std::mutex mutex;
  std::vector<Block*> finished;
};

struct Block {
  uint3 index;
  Launch* launch;
  unsigned alive;
  std::vector<Thread> threads;
  std::vector<Barrier> warps;
  Barrier barrier;
  char* stacks = nullptr;
#ifdef EMU_SWITCH_ASM
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;
  void* fiber = nullptr;
  const void* host_stack = nullptr;
  size_t host_stack_size = 0;
};

inline constexpr size_t kStack = 64 << 10;
inline constexpr unsigned kParallel = 2;  // blocks in parallel, with EMU_PARALLEL
inline unsigned order = 0;                // of threads and blocks: 0 forward, 1 backward, otherwise a seed
inline thread_local Thread* current = nullptr;

// Counters for tests: launches, and bytes through __ldcs and __stcs.
struct Counters {
  std::atomic<uint64_t> launches, read, written;
};
inline Counters counters;

[[noreturn]] inline void die(const char* message, const Site& site) {
  std::fprintf(stderr, "cuda_on_cpu: %s at %s:%u", message, site.file_name(), site.line());
  if (current) std::fprintf(stderr, " (block %u thread %u)", current->block->index.x, current->number);
  std::fputc('\n', stderr);
  std::abort();
}

// Fibers -------------------------------------------------------------------------------------------------------------

#ifdef EMU_SWITCH_ASM
extern "C" void emu_switch(void** save, void* load);
asm(R"(.text
.weak emu_switch
.type emu_switch,@function
emu_switch: pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
 movq %rsp,(%rdi); movq %rsi,%rsp
 popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret
.size emu_switch,.-emu_switch
)");
#endif

EMU_NOSAN inline void to_scheduler(Thread* t, [[maybe_unused]] bool last = false) {
  Block* b = t->block;
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(b->fiber, 1);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(last ? nullptr : &t->fake_stack, b->host_stack, b->host_stack_size);
#endif
#ifdef EMU_SWITCH_ASM
  emu_switch(&t->stack_pointer, b->stack_pointer);
#else
  swapcontext(&t->context, &b->context);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(t->fake_stack, &b->host_stack, &b->host_stack_size);
#endif
}

EMU_NOSAN inline void resume(Block* b, Thread* t) {
  current = t;
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(t->fiber, 1);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&b->fake_stack, t->stack, kStack);
#endif
#ifdef EMU_SWITCH_ASM
  emu_switch(&b->stack_pointer, t->stack_pointer);
#else
  swapcontext(&b->context, &t->context);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(b->fake_stack, nullptr, nullptr);
#endif
  current = nullptr;
}

EMU_NOSAN inline void entry() {
  Thread* t = current;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &t->block->host_stack, &t->block->host_stack_size);
#endif
  (*t->block->launch->body)();
  EMU_RELEASE(&t->block->launch->token);
  t->done = true;
  Block* b = t->block;
  if (--b->alive && b->barrier.arrived == b->alive)
    die("a thread has left before a barrier where others wait", b->barrier.site);
  to_scheduler(t, true);
  __builtin_trap();
}

// Waits for `expected` threads, all at one place in the source; returns the generation that has passed.
EMU_NOSAN inline unsigned meet(Barrier* barrier, unsigned expected, const Site& site) {
  Thread* t = current;
  const unsigned generation = barrier->generation;
  t->site = site;
  if (barrier->arrived == 0) {
    barrier->site = site;
  } else if (barrier->site.line() != site.line() || barrier->site.column() != site.column()) {
    die("threads meet at different barriers or shuffles", site);
  }
  if (++barrier->arrived == expected) {
    barrier->arrived = 0;
    ++barrier->generation;
  } else {
    t->waits_at = barrier;
    t->waits_in = generation;
    while (barrier->generation == generation) to_scheduler(t);
    t->waits_at = nullptr;
  }
  return generation;
}

EMU_NOSAN inline void sync_block(const Site& site) {
  Block* b = current->block;
  [[maybe_unused]] const unsigned generation = b->barrier.generation;
  EMU_RELEASE(&b->barrier.token[generation & 1]);
  meet(&b->barrier, b->alive, site);
  EMU_ACQUIRE(&b->barrier.token[generation & 1]);
}

// Returns the value of another lane of a full warp, or the caller's own if there is no such lane.
template <class T>
EMU_NOSAN T exchange(T value, int source, const Site& site) {
  static_assert(sizeof(T) <= 16);
  Thread* t = current;
  Barrier* barrier = &t->block->warps[t->number / 32];
  std::memcpy(barrier->slot[barrier->generation & 1][t->number % 32], &value, sizeof(T));
  const unsigned generation = meet(barrier, 32, site);
  if (0 <= source && source < 32) std::memcpy(&value, barrier->slot[generation & 1][source], sizeof(T));
  return value;
}

// Launching ----------------------------------------------------------------------------------------------------------

// Stacks are reused, except under sanitizers, whose shadow memory would contain the previous block.
struct Stacks {
  std::mutex mutex;
  std::vector<std::pair<size_t, char*>> free;
};
inline Stacks stacks;

inline char* take_stacks(size_t size) {
  const std::lock_guard<std::mutex> lock(stacks.mutex);
  for (auto& entry : stacks.free) {
    if (entry.first != size) continue;
    char* taken = entry.second;
    entry = stacks.free.back();
    stacks.free.pop_back();
    return taken;
  }
  void* fresh = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (fresh == MAP_FAILED) std::abort();
  return static_cast<char*>(fresh);
}

inline void give_stacks(char* used, size_t size) {
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
  munmap(used, size);
#else
  const std::lock_guard<std::mutex> lock(stacks.mutex);
  stacks.free.push_back({size, used});
#endif
}

inline void forget(Block* b) {
  give_stacks(b->stacks, kStack * b->threads.size());
  delete b;
}

template <class T>
void arrange(std::vector<T>& items, unsigned seed) {
  if (order == 1) std::reverse(items.begin(), items.end());
  if (order > 1) std::shuffle(items.begin(), items.end(), std::mt19937(order * 7919u + seed));
}

EMU_NOSAN inline void run_block(Launch* launch, unsigned index, std::latch* start = nullptr) {
  const unsigned n = launch->threads.x;
  Block* b = new Block{};
  b->index = {index, 0, 0};
  b->launch = launch;
  b->alive = n;
  b->threads = std::vector<Thread>(n);
  b->warps = std::vector<Barrier>((n + 31) / 32);
  b->stacks = take_stacks(kStack * n);
  // Start all blocks together: if a block ended before its neighbor began, the lock around the stacks would order them.
  if (start) start->arrive_and_wait();
#ifdef __SANITIZE_THREAD__
  b->fiber = __tsan_get_current_fiber();
#endif
  std::vector<Thread*> turns;
  for (unsigned i = 0; i < n; ++i) {
    Thread& t = b->threads[i];
    t.index = {i, 0, 0};
    t.number = i;
    t.block = b;
    t.stack = b->stacks + kStack * i;
#ifdef __SANITIZE_THREAD__
    t.fiber = __tsan_create_fiber(0);
#endif
#ifdef EMU_SWITCH_ASM
    void** top = reinterpret_cast<void**>(static_cast<char*>(t.stack) + kStack - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&entry);
    t.stack_pointer = top - 6;
#else
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack;
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = nullptr;
    makecontext(&t.context, &entry, 0);
#endif
    turns.push_back(&t);
  }
  arrange(turns, index);
  while (b->alive) {
    bool progress = false;
    for (Thread* t : turns) {
      if (t->done || (t->waits_at && t->waits_at->generation == t->waits_in)) continue;
      progress = true;
      resume(b, t);
    }
    if (!progress) die("deadlock: not all threads reach a barrier or shuffle", b->threads[0].site);
  }
#ifdef __SANITIZE_THREAD__
  for (Thread& t : b->threads) __tsan_destroy_fiber(t.fiber);
#endif
  // Freed after the launch: for ThreadSanitizer, freeing here would order the blocks.
  const std::lock_guard<std::mutex> lock(launch->mutex);
  launch->finished.push_back(b);
}

inline void run(dim3 blocks, dim3 threads, const std::function<void()>& body) {
  ++counters.launches;
  Launch launch{blocks, threads, &body, 0, {}, {}};
  std::vector<unsigned> indices(blocks.x);
  for (unsigned i = 0; i < blocks.x; ++i) indices[i] = i;
  arrange(indices, 0);
#ifdef EMU_PARALLEL
  for (unsigned i = 0; i < blocks.x; i += kParallel) {
    const unsigned stop = std::min(blocks.x, i + kParallel);
    std::latch start(stop - i);
    std::vector<std::thread> running;
    for (unsigned j = i; j < stop; ++j) {
      running.emplace_back([&launch, &start, index = indices[j]] { run_block(&launch, index, &start); });
    }
    for (std::thread& thread : running) thread.join();
  }
#else
  for (const unsigned index : indices) {
    run_block(&launch, index);
#ifndef __SANITIZE_THREAD__
    forget(launch.finished.back());
    launch.finished.clear();
#endif
  }
#endif
  EMU_ACQUIRE(&launch.token);
  for (Block* b : launch.finished) forget(b);
}

// Atomics and fences -------------------------------------------------------------------------------------------------

EMU_NOSAN inline void fence() {
  Thread* t = current;
#ifndef __SANITIZE_THREAD__
  std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
  for (unsigned i = 0; i < t->num_touched; ++i) EMU_ACQUIRE(const_cast<void*>(t->touched[i]));
  t->num_touched = 0;
  t->fenced = true;
}

template <class T>
T add(T* p, T value) {
  Thread* t = current;
  const bool released = std::exchange(t->fenced, false);
  if (t->num_touched < 8) t->touched[t->num_touched++] = p;
  return std::atomic_ref<T>(*p).fetch_add(value, released ? std::memory_order_release : std::memory_order_relaxed);
}

// An access that is not aligned to its size faults on a GPU, but not on a CPU.
inline void check_aligned(const void* p, size_t size, const Site& site) {
  if (reinterpret_cast<uintptr_t>(p) % size != 0) die("misaligned access", site);
}

}  // namespace emu

// Functions that kernels call ----------------------------------------------------------------------------------------

#define threadIdx (::emu::current->index)
#define blockIdx (::emu::current->block->index)

template <class... Parameters, class... Arguments>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  emu::run(config->gridDim, config->blockDim, [=] { kernel(arguments...); });
  return 0;
}

inline void __syncthreads(emu::Site site = emu::Site::current()) { emu::sync_block(site); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline void __threadfence() { emu::fence(); }
inline unsigned atomicAdd(unsigned* p, unsigned value) { return emu::add(p, value); }
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned delta, emu::Site site = emu::Site::current()) {
  return emu::exchange(value, static_cast<int>(emu::current->number % 32 + delta), site);
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p, emu::Site site = emu::Site::current()) {
  emu::check_aligned(p, sizeof(T), site);
  emu::counters.read.fetch_add(sizeof(T), std::memory_order_relaxed);
  return *p;
}
template <class T>
void __stcs(T* p, T value, emu::Site site = emu::Site::current()) {
  emu::check_aligned(p, sizeof(T), site);
  emu::counters.written.fetch_add(sizeof(T), std::memory_order_relaxed);
  *p = value;
}
