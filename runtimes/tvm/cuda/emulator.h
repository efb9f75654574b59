// CUDA's execution model on one CPU thread, so that the source TVM generates for a GPU can be run and tested without one.
//
// Every thread of a block is a fiber (ucontext). Fibers run until they reach a collective operation (barrier, shuffle,
// matrix product) and continue when everyone concerned has arrived: a warp's 32 lanes, or the block. A lane writes its
// operands to the warp's board before it waits and reads the others' afterwards; boards alternate, because a lane can be
// at most one collective ahead of its slowest neighbour.
//
// Blocks run one after another. Shared memory is filled with a pattern before each, so that reading what nobody wrote
// shows. The order of fibers is forwards or backwards (environment ISOFOLD_EMULATOR_ORDER), so that a missing barrier
// gives two different results. A barrier that some thread never reaches ends the process with a message.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <vector>

struct uint3_ { unsigned x, y, z; };

namespace isofold_emulator {

struct Board { uint32_t words[2][32][8]; };
struct Barrier { int arrived = 0, members = 0; unsigned generation = 0; };
struct Copy { void* to; const void* from; int size, valid; };
struct Fiber {
  ucontext_t context;
  uint3_ thread;
  int index;
  unsigned collectives = 0;
  bool done = false, waiting = false;
  Barrier* barrier = nullptr;
  unsigned generation = 0;
  std::vector<std::vector<Copy>> copies{1};  // asynchronous: groups, the last one open
};

extern Fiber* current;
extern ucontext_t scheduler;
extern std::vector<Board> boards;
extern std::vector<Barrier> warps;
extern Barrier block;
extern uint3_ block_index, block_size, grid_size;
extern unsigned char dynamic_memory[232448];

inline void arrive(Barrier& barrier) {
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  current->barrier = &barrier;
  current->generation = barrier.generation;
  current->waiting = true;
  swapcontext(&current->context, &scheduler);
}

// Exchange up to 8 words between the lanes of a warp; the result holds every lane's words.
inline const uint32_t (*exchange(const uint32_t* words, int count))[8] {
  int warp = current->index / 32, lane = current->index % 32;
  uint32_t(*board)[8] = boards[warp].words[current->collectives++ & 1];
  memcpy(board[lane], words, 4 * count);
  arrive(warps[warp]);
  return board;
}

// Asynchronous copies happen when they are waited for, so that a missing wait shows.
inline void copy(void* to, const void* from, int size, int valid) {
  if ((uintptr_t)to % size || (uintptr_t)from % size) abort();
  current->copies.back().push_back({to, from, size, valid});
}
inline void copy_commit() { current->copies.emplace_back(); }
inline void copy_wait(size_t pending) {
  auto& groups = current->copies;
  while (groups.size() - 1 > pending) {
    for (const Copy& c : groups.front()) {
      memset(c.to, 0, c.size);
      memcpy(c.to, c.from, c.valid);
    }
    groups.erase(groups.begin());
  }
}

inline int lane() { return current->index % 32; }
inline void undefined(const char* what) {
  fprintf(stderr, "isofold emulator: %s\n", what);
  abort();
}

void launch(uint3_ grid, uint3_ threads, const std::function<void()>& kernel);

}  // namespace isofold_emulator

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __shared__ static
#define threadIdx (isofold_emulator::current->thread)
#define blockIdx (isofold_emulator::block_index)
#define blockDim (isofold_emulator::block_size)
#define gridDim (isofold_emulator::grid_size)

inline void __syncthreads() { isofold_emulator::arrive(isofold_emulator::block); }
inline void __syncwarp() { isofold_emulator::arrive(isofold_emulator::warps[isofold_emulator::current->index / 32]); }
using std::max;
using std::min;
// Shuffles that TVM writes for its own reductions, by all lanes of a warp.
template <class T> inline T isofold_from_lane(T v, int lane, int width) {
  static_assert(sizeof(T) == 4, "a shuffle moves 32 bits");
  uint32_t word;
  memcpy(&word, &v, 4);
  const uint32_t(*all)[8] = isofold_emulator::exchange(&word, 1);
  int own = isofold_emulator::lane();
  if (lane / width != own / width || lane < 0) lane = own;  // outside of the segment: its own value
  memcpy(&v, all[lane], 4);
  return v;
}
template <class T> inline T __shfl_sync(unsigned, T v, int lane, int width = 32) {
  int own = isofold_emulator::lane();
  return isofold_from_lane(v, own / width * width + lane % width, width);
}
template <class T> inline T __shfl_down_sync(unsigned, T v, int delta, int width = 32) {
  return isofold_from_lane(v, isofold_emulator::lane() + delta, width);
}
template <class T> inline T __shfl_xor_sync(unsigned, T v, int mask, int width = 32) {
  return isofold_from_lane(v, isofold_emulator::lane() ^ mask, width);
}
inline unsigned __activemask() { return 0xFFFFFFFFu; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __int_as_float(int x) { float y; memcpy(&y, &x, 4); return y; }
inline int __float_as_int(float x) { int y; memcpy(&y, &x, 4); return y; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

struct half { uint16_t bits; };
typedef half __half;
struct __nv_bfloat16 { uint16_t bits; };
#define CUDART_INF_F INFINITY
#define CUDART_NAN_F NAN
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;

// Vectors of TVM's schedules, which it computes element by element.
#define ISO_VECTORS(type, name) \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; }; \
  struct alignas(16) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
ISO_VECTORS(float, float)
ISO_VECTORS(int, int)
ISO_VECTORS(unsigned, uint)
ISO_VECTORS(int64_t, longlong)
