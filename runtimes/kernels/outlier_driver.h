// Drives the kernels of outliers.py: what packed linears (linear_driver.h, linear_float_driver.h) add to the sums of a
// panel in front of the epilogue. No allocation, no locks, no state.
#ifndef ISOFOLD_OUTLIER_DRIVER_H
#define ISOFOLD_OUTLIER_DRIVER_H

#include <stdint.h>

// The outliers of one matrix (compiler/dialect/outlier_packing.py). Constant for the life of a session.
struct isofold_outliers {
  const uint16_t* places;  // [offsets[panels], 16], all below the number of inputs, not descending along a row
  const uint16_t* values;  // float16, likewise
  const int32_t* offsets;  // [panels + 1]
  float multiplier;
};

enum {
  ISOFOLD_OUTLIER_GEMV_ROWS = 4,  // rows of 8-bit activations up to which they are fetched one by one
  ISOFOLD_OUTLIER_BLOCK = 64      // rows that lie transposed side by side otherwise
};

// Blocks of 8-bit activations that have to be transposed before the first task; they may be in parallel.
static inline int64_t isofold_outlier_blocks(int64_t m) {
  return m <= ISOFOLD_OUTLIER_GEMV_ROWS ? 0 : (m + ISOFOLD_OUTLIER_BLOCK - 1) / ISOFOLD_OUTLIER_BLOCK;
}

// What they take: [blocks, kp, 64].
static inline int64_t isofold_outlier_scratch_bytes(int64_t kp, int64_t m) {
  return isofold_outlier_blocks(m) * ISOFOLD_OUTLIER_BLOCK * kp;
}

static inline void isofold_outlier_prepare(const struct isofold_kernels* k, const uint8_t* u, int64_t kp, int64_t m,
                                           void* scratch, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    int64_t from = i * ISOFOLD_OUTLIER_BLOCK, left = m - from;
    int64_t rows = left < ISOFOLD_OUTLIER_BLOCK ? left : ISOFOLD_OUTLIER_BLOCK;
    k->outlier_transpose(u + from * kp, kp, rows, kp, (uint8_t*)scratch + from * kp);
  }
}

// Dense weights and scales of the next panels, which few rows fetch meanwhile.
struct isofold_outlier_ahead {
  const void* weights;
  const void* scales;
  int64_t scale_bytes;  // of a panel
};

// Few rows of activations x (float32, or 8 bits) against panel `panel`: t [rows, 32] += factor * outliers.
static inline void isofold_outlier_gemv(const struct isofold_kernels* k, const struct isofold_outliers* o, int64_t panel,
                                        float factor, const void* x, int quantized, int64_t ldx, int64_t rows,
                                        const struct isofold_outlier_ahead* next, float* t) {
  int64_t from = o->offsets[panel], steps = o->offsets[panel + 1] - from;
  const uint16_t *places = o->places + from * 16, *values = o->values + from * 16;
  const uint8_t *ahead = (const uint8_t*)next->weights, *scales = (const uint8_t*)next->scales;
  if (steps == 0) return;
  int64_t stride = next->scale_bytes / steps < 64 ? next->scale_bytes / steps : 64;
  for (int64_t r = 0; r < rows;) {
    int64_t some = rows - r >= 4 ? 4 : rows - r >= 2 ? 2 : 1;
    if (quantized)
      (some == 4 ? k->outlier_gemv8_4 : some == 2 ? k->outlier_gemv8_2 : k->outlier_gemv8_1)(
          (const uint8_t*)x + r * ldx, ldx, places, values, steps, factor, ahead, scales, stride, t + r * 32, 32);
    else
      (some == 4 ? k->outlier_gemv_4 : some == 2 ? k->outlier_gemv_2 : k->outlier_gemv_1)(
          (const float*)x + r * ldx, ldx, places, values, steps, factor, ahead, scales, stride, t + r * 32, 32);
    r += some;
  }
}

// Rows m0..m0+rows of transposed 8-bit activations against a panel. m0 is a multiple of 16, and of 64 where there are more
// than 32 rows; t has room for whole vectors of 16 rows.
static inline void isofold_outlier_block(const struct isofold_kernels* k, const struct isofold_outliers* o, int64_t panel,
                                         float factor, const void* scratch, int64_t kp, int64_t m0, int64_t rows,
                                         float* t) {
  float sums[16 * ISOFOLD_OUTLIER_BLOCK];
  int64_t from = o->offsets[panel], steps = o->offsets[panel + 1] - from;
  if (steps == 0) return;
  for (int64_t r = 0; r < rows; r += ISOFOLD_OUTLIER_BLOCK) {
    int64_t at = m0 + r, left = rows - r, block = at / ISOFOLD_OUTLIER_BLOCK * ISOFOLD_OUTLIER_BLOCK;
    const uint8_t* ut = (const uint8_t*)scratch + block * kp + (at - block);
    (left > 32 ? k->outlier_block_4 : left > 16 ? k->outlier_block_2 : k->outlier_block_1)(
        ut, o->places + from * 16, o->values + from * 16, steps, factor, sums, t + r * 32, 32);
  }
}

#endif  // ISOFOLD_OUTLIER_DRIVER_H
