// The scheduler of the emulator (emulator.h).
#include "emulator.h"

namespace isofold_emulator {

Fiber* current;
ucontext_t scheduler;
std::vector<Board> boards;
std::vector<Barrier> warps;
Barrier block;
uint3_ block_index, block_size, grid_size;
alignas(128) unsigned char dynamic_memory[232448];

static const std::function<void()>* body;
static constexpr size_t kStack = 64 << 10;

static void enter() {
  (*body)();
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

static void stop(const char* why, int waiting, int total) {
  fprintf(stderr, "isofold emulator: %s: %d of %d threads of block (%u, %u, %u) wait\n", why, waiting, total,
          block_index.x, block_index.y, block_index.z);
  abort();
}

static void run_block(std::vector<Fiber>& fibers, char* stacks, bool backwards) {
  int total = (int)fibers.size(), left = total;
  block = Barrier();
  block.members = total;
  warps.assign((total + 31) / 32, Barrier());
  boards.resize(warps.size());
  for (int i = 0; i < total; ++i) {
    Fiber& f = fibers[i];
    f = Fiber();
    f.index = i;
    f.thread = {i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y};
    warps[i / 32].members++;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stacks + kStack * i;
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  memset(dynamic_memory, 0xFB, sizeof dynamic_memory);  // as floats: huge and negative
  while (left) {
    bool moved = false;
    for (int n = 0; n < total; ++n) {
      Fiber& f = fibers[backwards ? total - 1 - n : n];
      if (f.done || (f.waiting && f.barrier->generation == f.generation)) continue;
      f.waiting = false;
      current = &f;
      swapcontext(&scheduler, &f.context);
      moved = true;
      left -= f.done;
    }
    if (!moved) stop("a barrier or warp operation that not all threads reach", left, total);
  }
}

void launch(uint3_ grid, uint3_ threads, const std::function<void()>& kernel) {
  body = &kernel;
  grid_size = grid;
  block_size = threads;
  const char* order = getenv("ISOFOLD_EMULATOR_ORDER");
  bool backwards = order && !strcmp(order, "backwards");
  size_t total = (size_t)threads.x * threads.y * threads.z;
  std::vector<Fiber> fibers(total);
  char* stacks = (char*)malloc(kStack * total);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = {x, y, z};
        run_block(fibers, stacks, backwards);
      }
  free(stacks);
}

}  // namespace isofold_emulator
