// What the kernels need below the level of TIR: wide loads, asynchronous copies, matrix products, warp shuffles,
// conversions, and the decoders of the packed layouts (docs/dialect.md). Prepended to the source TVM generates.
//
// A lane of a matrix product is (g, t) = (lane / 4, lane % 4). Fragments of the 16 x 8 products, as PTX defines them:
//
//     f16, K = 16   A: a0 (g; 2t, 2t+1) a1 (g+8; same) a2 (g; 2t+8, 2t+9) a3 (g+8; same)   B: b0 (2t, 2t+1; g) b1 (2t+8, 2t+9; g)
//     8 bits, K = 32   A: a0 (g; 4t..4t+3) a1 (g+8) a2 (g; 4t+16..) a3 (g+8)                B: b0 (4t..4t+3; g) b1 (4t+16..; g)
//     C: c0, c1 (g; 2t, 2t+1)  c2, c3 (g+8; 2t, 2t+1)
//     2:4 sparse, 8 bits, K = 64   A: the 32 stored values of a row as for K = 32   B: bi (16i+4t..16i+4t+3; g)
//         E: the 16 indices of row g + 8 (t % 2) for inputs 32 (t / 2) .., 2 bits each
//
// Every function with PTX in it has a second form for the emulator (emulator.h) that follows this table.
#pragma once
#ifndef ISOFOLD_EMULATE
#include <cuda_fp16.h>
#define ISO_ARCH __CUDA_ARCH__
#ifdef __CUDACC_RTC__
#include <cuda/std/cstdint>
using cuda::std::int32_t;
using cuda::std::int64_t;
using cuda::std::int8_t;
using cuda::std::uint16_t;
using cuda::std::uint32_t;
using cuda::std::uint64_t;
using cuda::std::uint8_t;
#else
#include <stdint.h>
#endif
#define ISO_FN static __device__ __forceinline__
#else
#define ISO_FN static inline
#define ISO_ARCH ISOFOLD_EMULATE
#endif
// sm_89 multiplies FP8 in `mma`. sm_90a does only in `wgmma`: there ptxas makes of an FP8 `mma` conversions to halves and
// their products, which are better written out (registers); its conversion is one instruction.
#if defined(ISO_ARCH) && ISO_ARCH == 890
#define ISO_FP8_MMA
#elif defined(ISO_ARCH) && ISO_ARCH >= 900
#define ISO_FP8_CONVERT
#endif

// ---- memory

struct alignas(16) iso_u4 { uint32_t x, y, z, w; };
struct alignas(8) iso_u2 { uint32_t x, y; };

ISO_FN void iso_load16(uint32_t* d, const void* p) {
  iso_u4 v = *(const iso_u4*)p;
  d[0] = v.x, d[1] = v.y, d[2] = v.z, d[3] = v.w;
}
ISO_FN void iso_load8(uint32_t* d, const void* p) {
  iso_u2 v = *(const iso_u2*)p;
  d[0] = v.x, d[1] = v.y;
}
ISO_FN void iso_load4(uint32_t* d, const void* p) { d[0] = *(const uint32_t*)p; }
ISO_FN void iso_zero(uint32_t* d, int count) {
  for (int i = 0; i < count; ++i) d[i] = 0;
}

// ---- conversions

#ifdef ISOFOLD_EMULATE
static inline float iso_half_value(uint16_t h) {
  _Float16 v;
  memcpy(&v, &h, 2);
  return (float)v;
}
static inline uint16_t iso_half_bits(float x) {
  _Float16 v = (_Float16)x;
  uint16_t h;
  memcpy(&h, &v, 2);
  return h;
}
#endif

ISO_FN float iso_half_to_float(uint32_t h) {
#ifndef ISOFOLD_EMULATE
  return __half2float(__ushort_as_half((unsigned short)h));
#else
  return iso_half_value((uint16_t)h);
#endif
}
// Two floats to two halves, low one first; beyond the range of a half the largest one, not infinity; NaN stays NaN.
ISO_FN uint32_t iso_half2(float a, float b) {
#ifndef ISOFOLD_EMULATE
  uint32_t h;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(h) : "f"(b), "f"(a));
  return h;
#else
  a = a > 65504.0f ? 65504.0f : a < -65504.0f ? -65504.0f : a;
  b = b > 65504.0f ? 65504.0f : b < -65504.0f ? -65504.0f : b;
  return iso_half_bits(a) | (uint32_t)iso_half_bits(b) << 16;
#endif
}
ISO_FN uint32_t iso_sub2(uint32_t a, uint32_t b) {
#ifndef ISOFOLD_EMULATE
  __half2 h = __hsub2(*(__half2*)&a, *(__half2*)&b);
  return *(uint32_t*)&h;
#else
  return iso_half_bits(iso_half_value(a) - iso_half_value(b)) |
         (uint32_t)iso_half_bits(iso_half_value(a >> 16) - iso_half_value(b >> 16)) << 16;
#endif
}
ISO_FN uint32_t iso_permute(uint32_t a, uint32_t b, uint32_t selector) {
#ifndef ISOFOLD_EMULATE
  return __byte_perm(a, b, selector);
#else
  uint64_t both = a | (uint64_t)b << 32;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= (uint32_t)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return r;
#endif
}
// A power of two from its biased exponent (E8M0).
ISO_FN float iso_e8m0(uint32_t code) { return __int_as_float(code ? (int)(code << 23) : 0x00400000); }
ISO_FN float iso_e4m3(uint32_t code) {
  return iso_half_to_float((code & 0x80) << 8 | (code & 0x7F) << 7) * 256.0f;
}

// ---- warps

ISO_FN float iso_shuffle_xor(float v, int mask) {
#ifndef ISOFOLD_EMULATE
  return __shfl_xor_sync(0xFFFFFFFFu, v, mask);
#else
  uint32_t w;
  memcpy(&w, &v, 4);
  float r;
  memcpy(&r, &isofold_emulator::exchange(&w, 1)[isofold_emulator::lane() ^ mask][0], 4);
  return r;
#endif
}
ISO_FN float iso_warp_sum(float v) {
  for (int m = 16; m; m >>= 1) v += iso_shuffle_xor(v, m);
  return v;
}
ISO_FN float iso_warp_max(float v) {
  for (int m = 16; m; m >>= 1) v = fmaxf(v, iso_shuffle_xor(v, m));
  return v;
}
ISO_FN void iso_sync() { __syncthreads(); }
ISO_FN void iso_sync_warp() { __syncwarp(); }

// ---- matrix products: c += a b

ISO_FN void iso_mma_f16(float* c, const uint32_t* a, const uint32_t* b) {
#ifndef ISOFOLD_EMULATE
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  uint32_t own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const uint32_t(*all)[8] = isofold_emulator::exchange(own, 6);
  int g = isofold_emulator::lane() / 4, t = isofold_emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    int row = i / 2, column = 2 * t + i % 2;  // of A: g or g + 8; of B
    for (int k = 0; k < 16; ++k) {
      int upper = k / 8, from = k % 8 / 2, shift = 16 * (k % 2);
      c[i] += iso_half_value(all[4 * g + from][row + 2 * upper] >> shift) *
              iso_half_value(all[4 * column + from][4 + upper] >> shift);
    }
  }
#endif
}
// a signed, b unsigned bytes
ISO_FN void iso_mma_s8u8(int32_t* c, const uint32_t* a, const uint32_t* b) {
#ifndef ISOFOLD_EMULATE
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  uint32_t own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const uint32_t(*all)[8] = isofold_emulator::exchange(own, 6);
  int g = isofold_emulator::lane() / 4, t = isofold_emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    int row = i / 2, column = 2 * t + i % 2;
    for (int k = 0; k < 32; ++k) {
      int upper = k / 16, from = k % 16 / 4, shift = 8 * (k % 4);
      c[i] += (int)(int8_t)(all[4 * g + from][row + 2 * upper] >> shift) *
              (int)(uint8_t)(all[4 * column + from][4 + upper] >> shift);
    }
  }
#endif
}

// a signed with 2 of every 4 inputs stored, b unsigned bytes; indices of a pair ascend (else it is undefined)
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 5)
#define ISO_MMA_SPARSE "mma.sp::ordered_metadata"
#else
#define ISO_MMA_SPARSE "mma.sp"
#endif
ISO_FN void iso_mma_sparse_s8u8(int32_t* c, const uint32_t* a, const uint32_t* b, uint32_t e) {
#ifndef ISOFOLD_EMULATE
  asm volatile(
      ISO_MMA_SPARSE ".sync.aligned.m16n8k64.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(e));
#else
  int g = isofold_emulator::lane() / 4, t = isofold_emulator::lane() % 4;
  uint32_t indices[4], own[8] = {a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]};
  const uint32_t(*others)[8] = isofold_emulator::exchange(&e, 1);
  for (int i = 0; i < 4; ++i) indices[i] = others[4 * g + i][0];
  const uint32_t(*all)[8] = isofold_emulator::exchange(own, 8);
  for (int i = 0; i < 4; ++i) {
    int lower = i / 2, column = 2 * t + i % 2;
    for (int pair = 0; pair < 16; ++pair) {
      uint32_t both = indices[lower + 2 * (pair / 8)] >> 4 * (pair % 8) & 15;
      if ((both & 3) >= both >> 2) isofold_emulator::undefined("indices of a sparse product that do not ascend");
      for (int j = 0; j < 2; ++j) {
        int stored = 2 * pair + j, k = 4 * pair + (both >> 2 * j & 3);
        c[i] += (int)(int8_t)(all[4 * g + stored % 16 / 4][lower + 2 * (stored / 16)] >> 8 * (stored % 4)) *
                (int)(uint8_t)(all[4 * column + k % 16 / 4][4 + k / 16] >> 8 * (k % 4));
      }
    }
  }
#endif
}

// ---- FP8 products: a of E4M3 or E5M2, b of E4M3, 8-bit fragments; c is in units of iso_unit_e4m3(), iso_unit_e5m2()
//
// Elsewhere codes become halves in registers, exactly, and two products of them take bytes 0, 1
// and 2, 3 of every word: which input meets which is free as long as a and b agree.

ISO_FN uint32_t iso_float_bits(uint32_t tops, uint32_t magnitude, int shift);
ISO_FN uint32_t iso_spread(uint32_t word, int high);
// The value of a code of an activation, which may be NaN.
ISO_FN float iso_value_e4m3(uint32_t code) {
  return (code & 0x7F) == 0x7F ? __int_as_float(0x7FC00000) : iso_e4m3(code);
}
#ifdef ISOFOLD_EMULATE
static inline float iso_fp8_value(uint32_t code, int mantissa) {
  code &= 255;
  if (mantissa == 3) return iso_value_e4m3(code);
  return iso_half_value((uint16_t)(code << 8));
}
#endif
#ifdef ISO_FP8_MMA
ISO_FN float iso_unit_e4m3() { return 1.0f; }
ISO_FN float iso_unit_e5m2() { return 1.0f; }
#ifndef ISOFOLD_EMULATE
#define ISO_MMA_FP8(name, type)                                                                          \
  ISO_FN void name(float* c, const uint32_t* a, const uint32_t* b) {                                     \
    asm volatile("mma.sync.aligned.m16n8k32.row.col.f32." type ".e4m3.f32 {%0, %1, %2, %3}, "            \
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                         \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                    \
  }
ISO_MMA_FP8(iso_mma_e4m3, "e4m3")
ISO_MMA_FP8(iso_mma_e5m2, "e5m2")
#else
static inline void iso_mma_fp8(float* c, const uint32_t* a, const uint32_t* b, int mantissa) {
  uint32_t own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const uint32_t(*all)[8] = isofold_emulator::exchange(own, 6);
  int g = isofold_emulator::lane() / 4, t = isofold_emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    int row = i / 2, column = 2 * t + i % 2;
    for (int k = 0; k < 32; ++k) {
      int upper = k / 16, from = k % 16 / 4, shift = 8 * (k % 4);
      c[i] += iso_fp8_value(all[4 * g + from][row + 2 * upper] >> shift, mantissa) *
              iso_fp8_value(all[4 * column + from][4 + upper] >> shift, 3);
    }
  }
}
ISO_FN void iso_mma_e4m3(float* c, const uint32_t* a, const uint32_t* b) { iso_mma_fp8(c, a, b, 3); }
ISO_FN void iso_mma_e5m2(float* c, const uint32_t* a, const uint32_t* b) { iso_mma_fp8(c, a, b, 2); }
#endif
#else
#ifdef ISO_FP8_CONVERT
ISO_FN float iso_unit_e4m3() { return 1.0f; }
ISO_FN float iso_unit_e5m2() { return 1.0f; }
// Bytes 0, 1 or 2, 3 of a word as halves.
ISO_FN uint32_t iso_half2_e4m3(uint32_t word, int high) {
#ifndef ISOFOLD_EMULATE
  uint32_t h;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(h) : "h"((unsigned short)(word >> 16 * high)));
  return h;
#else
  word >>= 16 * high;
  return iso_half_bits(iso_value_e4m3(word & 255)) | (uint32_t)iso_half_bits(iso_value_e4m3(word >> 8 & 255)) << 16;
#endif
}
#else
ISO_FN float iso_unit_e4m3() { return 65536.0f; }
ISO_FN float iso_unit_e5m2() { return 256.0f; }
ISO_FN uint32_t iso_half2_e4m3(uint32_t word, int high) {  // 2^-8 of the values; NaN is 480
  return iso_float_bits(iso_spread(word, high), 0x7F007F00u, 1);
}
#endif
ISO_FN void iso_mma_e4m3(float* c, const uint32_t* a, const uint32_t* b) {
  for (int high = 0; high < 2; ++high) {
    uint32_t left[4], right[2];
    for (int i = 0; i < 4; ++i) left[i] = iso_half2_e4m3(a[i], high);
    for (int i = 0; i < 2; ++i) right[i] = iso_half2_e4m3(b[i], high);
    iso_mma_f16(c, left, right);
  }
}
ISO_FN void iso_mma_e5m2(float* c, const uint32_t* a, const uint32_t* b) {
  for (int high = 0; high < 2; ++high) {
    uint32_t left[4], right[2];
    for (int i = 0; i < 4; ++i) left[i] = iso_spread(a[i], high);
    for (int i = 0; i < 2; ++i) right[i] = iso_half2_e4m3(b[i], high);
    iso_mma_f16(c, left, right);
  }
}
#endif
// The code of a value, to nearest and saturating; -0 is 0, NaN 0x7F.
ISO_FN uint32_t iso_code_e4m3(float y) {
  if (!(y == y)) return 0x7F;
  float magnitude = fminf(fabsf(y), 448.0f);
  uint32_t bits, code;
  if (magnitude < 0.015625f) {
    code = (uint32_t)rintf(magnitude * 512.0f);
  } else {
    bits = (uint32_t)__float_as_int(magnitude);
    code = ((bits + 0x7FFFFu + (bits >> 20 & 1u)) >> 20) - 960u;
  }
  return code | (y < 0.0f ? 128u : 0u);
}
// A magnitude for the largest of a token, where NaN counts as infinity.
ISO_FN float iso_magnitude(float x) { return x == x ? fabsf(x) : __int_as_float(0x7F800000); }

// ---- asynchronous copies to shared memory; bytes beyond `valid` are zeros
//
// "memory": what was copied is read without a barrier by the thread that copied it, and must not be read earlier.

ISO_FN void iso_copy16(void* shared, const void* global, int valid) {
#ifndef ISOFOLD_EMULATE
  uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid) : "memory");
#else
  isofold_emulator::copy(shared, global, 16, valid);
#endif
}
ISO_FN void iso_copy8(void* shared, const void* global, int valid) {
#ifndef ISOFOLD_EMULATE
  uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(global), "r"(valid) : "memory");
#else
  isofold_emulator::copy(shared, global, 8, valid);
#endif
}
ISO_FN void iso_copy4(void* shared, const void* global, int valid) {
#ifndef ISOFOLD_EMULATE
  uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global), "r"(valid) : "memory");
#else
  isofold_emulator::copy(shared, global, 4, valid);
#endif
}
ISO_FN void iso_copy_commit() {
#ifndef ISOFOLD_EMULATE
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  isofold_emulator::copy_commit();
#endif
}
// Wait until at most `pending` groups are on their way.
#ifndef ISOFOLD_EMULATE
#define iso_copy_wait(pending) asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory")
#else
#define iso_copy_wait(pending) isofold_emulator::copy_wait(pending)
#endif

// ---- activations of epilogues

ISO_FN float iso_relu(float x) { return fmaxf(x, 0.0f); }
ISO_FN float iso_gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }
ISO_FN float iso_gelu_tanh(float x) { return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x))); }
ISO_FN float iso_silu(float x) { return x / (1.0f + expf(-x)); }

// ---- decoders: 8 codes of a row (a unit) to two words of signed bytes, inputs 0..3 and 4..7, or to four words of halves

ISO_FN void iso_bytes_int8(uint32_t* d, uint32_t low, uint32_t high) { d[0] = low, d[1] = high; }
// 16 w: the nibbles at the tops of bytes
ISO_FN void iso_bytes_int4(uint32_t* d, uint32_t word) {
  d[0] = word << 4 & 0xF0F0F0F0u;
  d[1] = word & 0xF0F0F0F0u;
}
// 64 w; a word holds 16 inputs, `second` says which 8
ISO_FN void iso_bytes_int2(uint32_t* d, uint32_t word, int second) {
  word >>= 4 * second;
  d[0] = word << 6 & 0xC0C0C0C0u;
  d[1] = word << 4 & 0xC0C0C0C0u;
}
// 32 w; `unit` 0..3 of the three planes' 32 inputs
ISO_FN void iso_bytes_int3(uint32_t* d, uint32_t p0, uint32_t p1, uint32_t p2, int unit) {
  uint32_t plane = unit == 0 ? p0 : unit == 1 ? p1 : p2;
  d[0] = plane & 0xE0E0E0E0u;
  d[1] = plane << 3 & 0xE0E0E0E0u;
  if (unit == 3) {
    d[0] = (p0 << 5 & 0x60606060u) | (p2 << 7 & 0x80808080u);
    d[1] = (p1 << 5 & 0x60606060u) | (p2 << 6 & 0x80808080u);
  }
}
// Signed bytes to halves minus `offset` (halves; 1152 is zero): a byte under the exponent of 1024 is 1024 + it, exactly.
ISO_FN void iso_halves_bytes(uint32_t* d, const uint32_t* bytes, uint32_t offset) {
  for (int i = 0; i < 2; ++i) {
    uint32_t biased = bytes[i] ^ 0x80808080u;
    d[2 * i] = iso_sub2(iso_permute(biased, 0x64646464u, 0x4140u), offset);
    d[2 * i + 1] = iso_sub2(iso_permute(biased, 0x64646464u, 0x4342u), offset);
  }
}
// Signs at bits 15 and 31, the other bits of a code moved to `shift` below them: halves times a power of two.
ISO_FN uint32_t iso_float_bits(uint32_t tops, uint32_t magnitude, int shift) {
  return (tops & 0x80008000u) | ((tops & magnitude) >> shift);
}
// E2M1, 2^-14 of its value; pairs (0, 2) (1, 3) (4, 6) (5, 7)
ISO_FN void iso_halves_e2m1(uint32_t* d, uint32_t word) {
  d[0] = iso_float_bits(word << 12, 0x70007000u, 3);
  d[1] = iso_float_bits(word << 4, 0x70007000u, 3);
  d[2] = iso_float_bits(word << 8, 0x70007000u, 3);
  d[3] = iso_float_bits(word, 0x70007000u, 3);
}
// Two codes of 8 bits in the low or high half of a word to the tops of halves
ISO_FN uint32_t iso_spread(uint32_t word, int high) { return iso_permute(word, 0, high ? 0x3424u : 0x1404u); }
// E4M3, 2^-8 of its value, natural pairs
ISO_FN void iso_halves_e4m3(uint32_t* d, const uint32_t* words) {
  for (int i = 0; i < 4; ++i) d[i] = iso_float_bits(iso_spread(words[i / 2], i % 2), 0x7F007F00u, 1);
}
ISO_FN void iso_halves_e5m2(uint32_t* d, const uint32_t* words) {
  for (int i = 0; i < 4; ++i) d[i] = iso_spread(words[i / 2], i % 2);
}
// 6 bits: low four of inputs 0..3, of 4..7, high two of 0..7, 16 bits each. Natural pairs; E3M2 2^-12, E2M3 2^-14.
ISO_FN uint32_t iso_code6(uint32_t low0, uint32_t low1, uint32_t top, int i) {
  uint32_t low = i < 4 ? low0 : low1;
  return (low >> 4 * (i % 4) & 15) | (top >> 2 * i & 3) << 4;
}
ISO_FN void iso_halves_fp6(uint32_t* d, uint32_t low0, uint32_t low1, uint32_t top, int mantissa) {
  for (int i = 0; i < 4; ++i) {
    uint32_t both = iso_code6(low0, low1, top, 2 * i) | iso_code6(low0, low1, top, 2 * i + 1) << 16;
    d[i] = (both << 10 & 0x80008000u) | (both & 0x001F001Fu) << (10 - mantissa);
  }
}
// 16 entries of a table as bytes: t[0..3] the low bytes of their halves, t[4..7] the high ones. Pairs (i, i + 4).
ISO_FN void iso_halves_table(uint32_t* d, uint32_t word, const uint32_t* t) {
  for (int i = 0; i < 2; ++i, word >>= 16) {
    uint32_t index = word & 0x7777u, upper = (word >> 1 & 0x4444u) | 0x3210u;
    uint32_t low = iso_permute(iso_permute(t[0], t[1], index), iso_permute(t[2], t[3], index), upper);
    uint32_t high = iso_permute(iso_permute(t[4], t[5], index), iso_permute(t[6], t[7], index), upper);
    d[2 * i] = iso_permute(low, high, 0x5140u);
    d[2 * i + 1] = iso_permute(low, high, 0x7362u);
  }
}
ISO_FN void iso_table_bytes(uint32_t* t, const float* table) {
  for (int i = 0; i < 4; ++i) {
    uint32_t a = iso_half2(table[4 * i], table[4 * i + 1]), b = iso_half2(table[4 * i + 2], table[4 * i + 3]);
    t[i] = iso_permute(a, b, 0x6420u);
    t[4 + i] = iso_permute(a, b, 0x7531u);
  }
}

// Eight floats of a row to halves, pairs (p0, p1) ... of `order` (a digit each, from the lowest); beyond `left` zeros.
ISO_FN void iso_halves_floats(uint32_t* d, const float* row, int left, uint32_t order, int aligned) {
  float v[8];
  if (aligned && left >= 8) {
    uint32_t* w = (uint32_t*)v;
    iso_load16(w, row);
    iso_load16(w + 4, row + 4);
  } else {
    for (int i = 0; i < 8; ++i) v[i] = i < left ? row[i] : 0.0f;
  }
  for (int i = 0; i < 4; ++i) d[i] = iso_half2(v[order >> 8 * i & 7], v[order >> (8 * i + 4) & 7]);
}
ISO_FN uint32_t iso_half_twice(float x) { return iso_half2(x, x); }
ISO_FN uint32_t iso_mul2(uint32_t a, uint32_t b) {
#ifndef ISOFOLD_EMULATE
  __half2 h = __hmul2(*(__half2*)&a, *(__half2*)&b);
  return *(uint32_t*)&h;
#else
  return iso_half_bits(iso_half_value(a) * iso_half_value(b)) |
         (uint32_t)iso_half_bits(iso_half_value(a >> 16) * iso_half_value(b >> 16)) << 16;
#endif
}
// Four halves times a power of two and then a scale: exact for E2M1 with scales of E4M3 (NVFP4).
ISO_FN void iso_halves_scale(uint32_t* d, float power, uint32_t scale_code) {
  uint32_t p = iso_half_twice(power), s = iso_half_twice(iso_e4m3(scale_code));
  for (int i = 0; i < 4; ++i) d[i] = iso_mul2(iso_mul2(d[i], p), s);
}
ISO_FN int32_t iso_signed_byte(uint32_t word, int index) { return (int8_t)(word >> 8 * index); }
ISO_FN void iso_store16(void* p, const uint32_t* d) {
  iso_u4 v = {d[0], d[1], d[2], d[3]};
  *(iso_u4*)p = v;
}
// Sums of halves, rounded once more: codebooks of several vectors where the sum is stored.
ISO_FN void iso_halves_add(uint32_t* d, const uint32_t* more) {
  for (int i = 0; i < 4; ++i)
    d[i] = iso_half2(iso_half_to_float(d[i] & 0xFFFF) + iso_half_to_float(more[i] & 0xFFFF),
                     iso_half_to_float(d[i] >> 16) + iso_half_to_float(more[i] >> 16));
}

// ---- sparse rows: bits of a word below a lane

ISO_FN int32_t iso_rank(uint32_t word, int lane) { return __popc(word & ((1u << lane) - 1u)); }
ISO_FN int32_t iso_ones(uint32_t word) { return __popc(word); }
// Values of a window (sparse_windows.py) in front of a row's, of the row, and of all 16 rows.
ISO_FN void iso_window(int32_t* span, const uint8_t* counts, int row) {
  uint32_t four[4];
  iso_load16(four, counts);
  span[0] = span[1] = span[2] = 0;
  for (int i = 0; i < 16; ++i) {
    int count = four[i / 4] >> 8 * (i % 4) & 255;
    span[0] += i < row ? count : 0;
    span[1] += i == row ? count : 0;
    span[2] += count;
  }
}
// Values of a panel (sparse_panels.py) in front of those of word `word` of eight, and of all eight.
ISO_FN void iso_panel_words(int32_t* span, const uint8_t* places, int word) {
  span[0] = span[1] = 0;
  for (int i = 0; i < 8; ++i) {
    uint32_t bits[2];
    iso_load8(bits, places + 16 * i);
    int ones = __popc(bits[0]) + __popc(bits[1]);
    span[0] += i < word ? ones : 0;
    span[1] += ones;
  }
}
// Ones below a bit of 64, or -1 where it is 0.
ISO_FN int32_t iso_rank64(const uint32_t* bits, int bit) {
  uint32_t word = bits[bit / 32];
  return word >> bit % 32 & 1 ? iso_rank(word, bit % 32) + (bit < 32 ? 0 : __popc(bits[0])) : -1;
}
// Byte x of each of four words.
ISO_FN uint32_t iso_byte_of_four(const uint32_t* words, int x) {
  uint32_t selector = 0x40u + 0x11u * x;
  return iso_permute(iso_permute(words[0], words[1], selector), iso_permute(words[2], words[3], selector), 0x5410u);
}
// Index of value j of a block (sparse_groups.py) in its group, `width` bits.
ISO_FN int32_t iso_group_index(const uint8_t* places, int j, int width) {
  int bit = width * j;
  int word = places[bit / 8];
  if (width == 3 && bit % 8 > 5) word |= places[bit / 8 + 1] << 8;
  return word >> bit % 8 & ((1 << width) - 1);
}

// ---- outliers: entries of a packed row are 16 apart (outlier_packing.py)

ISO_FN float iso_half_at(const void* p) { return iso_half_to_float(*(const uint16_t*)p); }
// Entries i, i + step, ... of a row with `count` tokens of x `[rows, width]` from `first` on. Loads have no branch around
// them; tokens that are not there are the last one again, and nobody keeps their sums.
template <class X>
ISO_FN void iso_outliers_few(float* sums, int count, const X* x, int64_t first, int64_t rows, int width,
                             const uint16_t* places, const void* values, int i, int end, int step) {
  for (; i < end; i += step) {
    const X* column = x + places[i];
    float w = iso_half_at((const uint16_t*)values + i);
#pragma unroll
    for (int token = 0; token < count; ++token) {
      int64_t row = first + token;
      sums[token] += w * (float)column[(row < rows ? row : rows - 1) * width];
    }
  }
}
// Entries of a row from *entry on whose place lies below `last`, with 8 tokens of inputs `start`.. as halves.
ISO_FN void iso_outliers_chunk(float* sums, int* entry, int end, const uint16_t* places, const void* values,
                               const uint32_t* tokens, int start, int last) {
  int i = *entry;
  for (; i < end && places[i] < last; i += 16) {
    uint32_t four[4];
    iso_load16(four, tokens + 4 * (places[i] - start));
    float w = iso_half_at((const uint16_t*)values + i);
    for (int j = 0; j < 8; ++j) sums[j] += w * iso_half_to_float(four[j / 2] >> 16 * (j % 2) & 0xFFFF);
  }
  *entry = i;
}

// ---- attention

// Four floats of a row that ends after `left`; `wide`: rows are multiples of 16 bytes.
ISO_FN void iso_load_floats4(float* d, const float* p, int left, int wide) {
  if (wide && left >= 4) {
    iso_load16((uint32_t*)d, p);
  } else {
    for (int i = 0; i < 4; ++i) d[i] = i < left ? p[i] : 0.0f;
  }
}
ISO_FN void iso_zero_floats(float* d, int count) {
  for (int i = 0; i < count; ++i) d[i] = 0.0f;
}
ISO_FN void iso_store4(void* p, uint32_t word) { *(uint32_t*)p = word; }
// Eight floats in registers to halves in the pairs of `order`.
ISO_FN void iso_halves_eight(uint32_t* d, const uint32_t* floats, uint32_t order) {
  for (int i = 0; i < 4; ++i)
    d[i] = iso_half2(__int_as_float(floats[order >> 8 * i & 7]), __int_as_float(floats[order >> (8 * i + 4) & 7]));
}
// ---- caches of codes (cache_packing.py)

// Four bytes to floats: a byte below the exponent of 2^23 is 2^23 + it, exactly.
ISO_FN void iso_byte_floats(float* d, uint32_t word) {
  for (int i = 0; i < 4; ++i)
    d[i] = __int_as_float((int)iso_permute(word, 0x4B000000u, 0x7440u + i)) - 8388608.0f;
}
// Four codes of a word, low nibbles after a shift or bytes, s (u - z)
ISO_FN void iso_cache_decode(float* d, uint32_t word, int shift, int bits, float s, float z) {
  iso_byte_floats(d, bits == 4 ? word >> shift & 0x0F0F0F0Fu : word);
  for (int i = 0; i < 4; ++i) d[i] = s * (d[i] - z);
}
// Dimensions start .. start + 3 of a token, s (u - z); start is a multiple of 4.
ISO_FN void iso_cache_floats4(float* d, const uint8_t* codes, const float* pair, int start, int bits) {
  uint32_t word;
  iso_load4(&word, codes + (bits == 8 ? start : start / 32 * 16 + start % 16));
  iso_cache_decode(d, word, start / 16 % 2 * 4, bits, pair[0], pair[1]);
}
// Dimensions start .. start + 7 as halves in natural pairs; start is a multiple of 8.
ISO_FN void iso_cache_halves8(uint32_t* d, const uint8_t* codes, const float* pair, int start, int bits) {
  float v[8];
  iso_cache_floats4(v, codes, pair, start, bits);
  iso_cache_floats4(v + 4, codes, pair, start + 4, bits);
  for (int i = 0; i < 4; ++i) d[i] = iso_half2(v[2 * i], v[2 * i + 1]);
}
