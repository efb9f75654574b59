/* What this machine can do, for the benchmarks to compare with: read bandwidth and the rate of vpdpbusd.
   Compiled by harness.py with `-O3 -march=native -pthread -shared` into the cache. */
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

typedef uint64_t block __attribute__((vector_size(64)));

typedef struct {
    const block *data;
    size_t blocks;
    long rounds;
    int streams;
    clockid_t clock;
    pthread_barrier_t *barrier;
    double start, end;
    uint64_t sink;
} task;

static double now(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* One sequential stream, or four at once: with 4 KiB pages the hardware prefetchers stop at every page end, and
   several streams hide part of that. */
static void *read_slice(void *argument) {
    task *t = argument;
    block a[8] = {{0}};
    pthread_barrier_wait(t->barrier);
    t->start = now(t->clock);
    if (t->streams == 4) {
        size_t quarter = t->blocks / 4;
        const block *p = t->data, *q = p + quarter, *r = q + quarter, *s = r + quarter;
        for (size_t i = 0; i + 2 <= quarter; i += 2)
            for (int j = 0; j < 2; j++) {
                a[j] ^= p[i + j];
                a[j + 2] ^= q[i + j];
                a[j + 4] ^= r[i + j];
                a[j + 6] ^= s[i + j];
            }
    } else {
        for (size_t i = 0; i + 8 <= t->blocks; i += 8)
            for (int j = 0; j < 8; j++) a[j] ^= t->data[i + j];
    }
    block all = a[0] ^ a[1] ^ a[2] ^ a[3] ^ a[4] ^ a[5] ^ a[6] ^ a[7];
    t->sink = all[0] ^ all[7];
    t->end = now(t->clock);
    return NULL;
}

#ifdef __AVX512VNNI__
/* Twelve independent accumulators cover the latency of the instruction. Written in assembly: the compiler would
   keep an array of accumulators in memory, or fold a loop whose operands never change. */
static void *dot_products(void *argument) {
    task *t = argument;
    long rounds = t->rounds;
    pthread_barrier_wait(t->barrier);
    t->start = now(t->clock);
    __asm__ volatile(
        "1:\n\t"
        "vpdpbusd %%zmm12, %%zmm13, %%zmm0\n\tvpdpbusd %%zmm12, %%zmm13, %%zmm1\n\t"
        "vpdpbusd %%zmm12, %%zmm13, %%zmm2\n\tvpdpbusd %%zmm12, %%zmm13, %%zmm3\n\t"
        "vpdpbusd %%zmm12, %%zmm13, %%zmm4\n\tvpdpbusd %%zmm12, %%zmm13, %%zmm5\n\t"
        "vpdpbusd %%zmm12, %%zmm13, %%zmm6\n\tvpdpbusd %%zmm12, %%zmm13, %%zmm7\n\t"
        "vpdpbusd %%zmm12, %%zmm13, %%zmm8\n\tvpdpbusd %%zmm12, %%zmm13, %%zmm9\n\t"
        "vpdpbusd %%zmm12, %%zmm13, %%zmm10\n\tvpdpbusd %%zmm12, %%zmm13, %%zmm11\n\t"
        "dec %0\n\tjnz 1b"
        : "+r"(rounds)
        :
        : "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11", "zmm12",
          "zmm13", "cc");
    t->end = now(t->clock);
    return NULL;
}
#endif

/* Runs `body` on `threads` threads that start together; seconds from the first start to the last end
   (cpu: processor time of the thread that took most), or -1. */
static double run(void *(*body)(void *), const void *data, size_t bytes, long rounds, int threads, int streams,
                  int cpu) {
    pthread_t ids[64];
    task tasks[64];
    pthread_barrier_t barrier;
    clockid_t clock = cpu ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC;
    if (threads < 1 || threads > 64 || pthread_barrier_init(&barrier, NULL, (unsigned)threads)) return -1;
    size_t share = bytes / sizeof(block) / (size_t)threads;
    for (int i = 0; i < threads; i++) {
        tasks[i] = (task){(const block *)data + share * (size_t)i, share, rounds, streams, clock, &barrier, 0, 0, 0};
        if (pthread_create(&ids[i], NULL, body, &tasks[i])) return -1;
    }
    double first = 0, last = 0, longest = 0;
    for (int i = 0; i < threads; i++) {
        pthread_join(ids[i], NULL);
        if (tasks[i].end - tasks[i].start > longest) longest = tasks[i].end - tasks[i].start;
        if (i == 0 || tasks[i].start < first) first = tasks[i].start;
        if (i == 0 || tasks[i].end > last) last = tasks[i].end;
    }
    pthread_barrier_destroy(&barrier);
    return cpu ? longest : last - first;
}

/* Seconds to read `bytes` (64-byte aligned) once, each thread its own part in 1 or 4 streams. */
double probe_read(const void *data, size_t bytes, int threads, int streams, int cpu) {
    return run(read_slice, data, bytes, 0, threads, streams, cpu);
}

/* Seconds for rounds * 12 vpdpbusd on each thread (128 operations each), or -1 without AVX-512 VNNI. */
double probe_vnni(long rounds, int threads, int cpu) {
#ifdef __AVX512VNNI__
    return run(dot_products, NULL, 0, rounds, threads, 0, cpu);
#else
    (void)rounds;
    (void)threads;
    (void)cpu;
    return -1;
#endif
}
