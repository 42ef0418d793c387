// Convolutions, batch norm and ReLU of small residual nets on CPUs with AMX-BF16: what `blto.models.native.ops` calls.
//
// Layout. A batch is cut into blocks of 32 images, each two groups of 16. A map is
//     [block][pixel][group][channel / 2][16 images][2 channels]   bf16,
// so that 16 channel pairs of one pixel and group are 1 KiB in a row: one AMX tile, ready as the right-hand operand of a
// product over channels. A convolution is a sum over (tap, source pixel) pairs that lie inside the map: for each output
// pixel, Y[k][image] = sum over taps of W_tap[k][c] X[c][image]. Borders cost nothing and any stride is the same loop.
//
// Fusion. An operand may be "activated on load": its ReLU(scale[c] * y + shift[c]) is computed a block at a time, in
// cache, so a batch norm's output is never written to memory. The statistics of a convolution's output are summed while
// it is in registers. The gradient of a batch norm reaches a convolution as G = dy + d1[k] + 2 y d2[k], where d1 and d2
// are the gradients of the sums of y and of y squared.
//
// All functions take raw pointers that the caller has checked, and run on OpenMP's threads over blocks. They return
// DONE, or NO_MEMORY where their working memory could not be had; what they were to write is then undefined.

#include "common.h"

#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace {

using bf16 = uint16_t;

constexpr int ROW = 2 * GROUP;     // bf16 values in a register: 16 images x 2 channels
constexpr int TILE = 16 * ROW;     // bf16 values in a tile, also the stride of packed weights
constexpr int STRIP = 4;           // channel pairs whose constants and sums stay in registers

// ---------------------------------------------------------------------------------------------------- registers

inline __m512 low(__m512i pair) { return _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)); }
inline __m512 high(__m512i pair) {
  return _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(int(0xffff0000u))));
}

// Channels c and c + 1 of 16 images as one register of interleaved bf16, rounded to nearest even.
inline __m512i pack(__m512 first, __m512 second) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);  // 16 of `first`, then 16 of `second`
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, both);
}

// Two groups' interleaved pairs -> 32 images of the first channel, 32 of the second.
inline __m512i even_images(__m512i a, __m512i b) {
  const __m512i order = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24,
                                         22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  return _mm512_permutex2var_epi16(a, order, b);
}
inline __m512i odd_images(__m512i a, __m512i b) {
  const __m512i order = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                         23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16(a, order, b);
}

// Transpose 16 x 16 values of 32 bits, in place.
inline void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// A rational approximation that is exact to a few units in the last place of a float; NaN stays NaN.
inline __m512 tanh(__m512 v) {
  const __m512 limit = _mm512_set1_ps(7.90531110763549805f);
  const __m512 x = _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), limit), _mm512_min_ps(limit, v));
  const __m512 z = _mm512_mul_ps(x, x);
  auto polynomial = [&](std::initializer_list<float> coefficients) {
    __m512 sum = _mm512_setzero_ps();
    for (float coefficient : coefficients) sum = _mm512_fmadd_ps(sum, z, _mm512_set1_ps(coefficient));
    return sum;
  };
  const __m512 above = polynomial({-2.76076847742355e-16f, 2.00018790482477e-13f, -8.60467152213735e-11f,
                                   5.12229709037114e-08f, 1.48572235717979e-05f, 6.37261928875436e-04f,
                                   4.89352455891786e-03f});
  const __m512 below =
      polynomial({1.19825839466702e-06f, 1.18534705686654e-04f, 2.26843463243900e-03f, 4.89352518554385e-03f});
  return _mm512_div_ps(_mm512_mul_ps(x, above), below);
}

inline __m512i load(const bf16* p) { return _mm512_loadu_si512(p); }
inline void store(bf16* p, __m512i v) { _mm512_storeu_si512(p, v); }

// ---------------------------------------------------------------------------------------------------- tiles

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

// Accumulators 0 to 3 (16 x 16 floats), left operands 4 and 5 (16 rows of `depth` bf16), right operands 6 and 7.
void configure_tiles(int depth) {
  TileConfig config;
  for (int t = 0; t < 4; ++t) config.rows[t] = 16, config.bytes_per_row[t] = 64;
  for (int t = 4; t < 6; ++t) config.rows[t] = 16, config.bytes_per_row[t] = uint16_t(2 * depth);
  for (int t = 6; t < 8; ++t) config.rows[t] = uint8_t(depth / 2), config.bytes_per_row[t] = 64;
  _tile_loadconfig(&config);
}

// ---------------------------------------------------------------------------------------------------- geometry

// The (tap, source pixel) pairs of every target pixel; `start` has targets + 1 entries.
struct Pairs {
  const int32_t* start;
  const int32_t* tap;
  const int32_t* source;
};

struct Affine {  // per channel; null scale: the operand is taken as it is
  const float* scale;
  const float* shift;
};

// ---------------------------------------------------------------------------------------------------- on load

// relu(scale * y + shift) of one block, four channel pairs at a time.
void activate_block(const bf16* y, Affine affine, int pixels, int channels, bf16* out) {
  const int half = channels / 2;
  for (int c = 0; c < half; c += STRIP) {
    __m512 scale[2 * STRIP], shift[2 * STRIP];
    for (int i = 0; i < 2 * STRIP; ++i) {
      scale[i] = _mm512_set1_ps(affine.scale[2 * c + i]);
      shift[i] = _mm512_set1_ps(affine.shift[2 * c + i]);
    }
    for (int row = 0; row < 2 * pixels; ++row)
      for (int i = 0; i < STRIP; ++i) {
        const size_t at = (size_t(row) * half + c + i) * ROW;
        const __m512i v = load(y + at);
        store(out + at, pack(relu(_mm512_fmadd_ps(low(v), scale[2 * i], shift[2 * i])),
                             relu(_mm512_fmadd_ps(high(v), scale[2 * i + 1], shift[2 * i + 1]))));
      }
  }
}

// The same operand with images in a row: out[pixel][channel][32 images]. Null scale: no activation.
void images_in_rows(const bf16* y, Affine affine, int pixels, int channels, bf16* out) {
  const int half = channels / 2;
  for (int p = 0; p < pixels; ++p) {
    const bf16* source = y + size_t(p) * channels * BLOCK;
    bf16* target = out + size_t(p) * channels * BLOCK;
    for (int c = 0; c < half; ++c) {
      __m512i v[2] = {load(source + c * ROW), load(source + (half + c) * ROW)};
      if (affine.scale) {
        const __m512 s0 = _mm512_set1_ps(affine.scale[2 * c]), s1 = _mm512_set1_ps(affine.scale[2 * c + 1]);
        const __m512 b0 = _mm512_set1_ps(affine.shift[2 * c]), b1 = _mm512_set1_ps(affine.shift[2 * c + 1]);
        for (__m512i& g : v)
          g = pack(relu(_mm512_fmadd_ps(low(g), s0, b0)), relu(_mm512_fmadd_ps(high(g), s1, b1)));
      }
      store(target + (2 * c) * BLOCK, even_images(v[0], v[1]));
      store(target + (2 * c + 1) * BLOCK, odd_images(v[0], v[1]));
    }
  }
}

// G = dy + d1 + 2 y d2, as it lies (`plain`) and with image pairs down and channels across (`turned`):
// turned[pixel][channel / 16][16 image pairs][16 channels][2 images]. Null d1: G = dy. Null `plain` or `turned`: not
// wanted.
void gradient_block(const bf16* dy, const bf16* y, const float* d1, const float* d2, int pixels, int channels,
                    bf16* plain, bf16* turned) {
  const int half = channels / 2;
  const __m512 two = _mm512_set1_ps(2.0f);
  for (int p = 0; p < pixels; ++p) {
    const size_t at = size_t(p) * channels * BLOCK;
    for (int k = 0; k < channels; k += 16) {
      __m512i r[16];
      for (int j = 0; j < 8; ++j) {
        const int c = k / 2 + j;
        __m512i g[2];
        for (int group = 0; group < 2; ++group) {
          const size_t here = at + (size_t(group) * half + c) * ROW;
          g[group] = load(dy + here);
          if (d1) {
            const __m512i v = load(y + here);
            const __m512 a0 = _mm512_set1_ps(d1[2 * c]), a1 = _mm512_set1_ps(d1[2 * c + 1]);
            const __m512 b0 = _mm512_mul_ps(two, _mm512_set1_ps(d2[2 * c]));
            const __m512 b1 = _mm512_mul_ps(two, _mm512_set1_ps(d2[2 * c + 1]));
            g[group] = pack(_mm512_fmadd_ps(low(v), b0, _mm512_add_ps(low(g[group]), a0)),
                            _mm512_fmadd_ps(high(v), b1, _mm512_add_ps(high(g[group]), a1)));
          }
          if (plain) store(plain + here, g[group]);
        }
        r[2 * j] = even_images(g[0], g[1]);
        r[2 * j + 1] = odd_images(g[0], g[1]);
      }
      if (!turned) continue;
      transpose(r);
      for (int j = 0; j < 16; ++j) store(turned + at + size_t(k) * BLOCK + j * ROW, r[j]);
    }
  }
}

// The 27 inputs of every 3x3 window of an RGB image as 16 channel pairs (the last five inputs are zero).
// Input: [pixel][group][2][16][2], the second row holding (blue, 0). Pairs 0-8: red and green of each tap; 9-13: blue of
// two taps. `source` has 9 pixels per window, -1 outside the image.
void windows_block(const bf16* input, const int32_t* source, int pixels, bf16* out) {
  const __m512i zero = _mm512_setzero_si512();
  for (int p = 0; p < pixels; ++p)
    for (int group = 0; group < 2; ++group) {
      bf16* target = out + (size_t(p) * 2 + group) * TILE;
      __m512i blue[10];
      for (int t = 0; t < 9; ++t) {
        const int32_t q = source[p * 9 + t];
        const bf16* from = input + (size_t(q < 0 ? 0 : q) * 2 + group) * 2 * ROW;
        store(target + t * ROW, q < 0 ? zero : load(from));
        blue[t] = q < 0 ? zero : load(from + ROW);
      }
      blue[9] = zero;
      for (int t = 0; t < 10; t += 2)
        store(target + (9 + t / 2) * ROW, _mm512_or_si512(blue[t], _mm512_slli_epi32(blue[t + 1], 16)));
      store(target + 14 * ROW, zero);
      store(target + 15 * ROW, zero);
    }
}

// The adjoint of `windows_block`: sums the gradients of all windows that a pixel lies in. `sums` is working memory of
// pixels * 6 * 16 floats.
void windows_adjoint(const bf16* gradient, const int32_t* source, int in_pixels, int out_pixels, float* sums, bf16* out) {
  std::memset(sums, 0, size_t(in_pixels) * 6 * GROUP * sizeof(float));
  for (int p = 0; p < out_pixels; ++p)
    for (int group = 0; group < 2; ++group)
      for (int t = 0; t < 9; ++t) {
        const int32_t q = source[p * 9 + t];
        if (q < 0) continue;
        const bf16* from = gradient + (size_t(p) * 2 + group) * TILE;
        const __m512i red_green = load(from + t * ROW), blues = load(from + (9 + t / 2) * ROW);
        float* to = sums + (size_t(q) * 2 + group) * 3 * GROUP;
        _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), low(red_green)));
        _mm512_store_ps(to + 16, _mm512_add_ps(_mm512_load_ps(to + 16), high(red_green)));
        _mm512_store_ps(to + 32, _mm512_add_ps(_mm512_load_ps(to + 32), t % 2 ? high(blues) : low(blues)));
      }
  for (int q = 0; q < 2 * in_pixels; ++q) {
    const float* from = sums + size_t(q) * 3 * GROUP;
    store(out + size_t(q) * 2 * ROW, pack(_mm512_load_ps(from), _mm512_load_ps(from + 16)));
    store(out + size_t(q) * 2 * ROW + ROW, pack(_mm512_load_ps(from + 32), _mm512_setzero_ps()));
  }
}

// ---------------------------------------------------------------------------------------------------- products

// One target pixel: acc[m][group] = sum over its pairs of W_tap[16 m ..][c] source[c][16 images of group].
template <int M>
inline void gather_pixel(const bf16* source, const Pairs& pairs, int pixel, const bf16* weights, int channels,
                         float* acc) {
  const int depth = std::min(channels, 32), chunks = channels / depth;
  const size_t pixel_size = size_t(channels) * BLOCK, group_size = pixel_size / 2;
  const size_t tap_size = size_t(chunks) * M * TILE;
  _tile_zero(0);
  _tile_zero(1);
  if (M == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int32_t i = pairs.start[pixel]; i < pairs.start[pixel + 1]; ++i) {
    const bf16* b = source + size_t(pairs.source[i]) * pixel_size;
    const bf16* a = weights + size_t(pairs.tap[i]) * tap_size;
    for (int chunk = 0; chunk < chunks; ++chunk, a += M * TILE, b += TILE) {
      _tile_loadd(4, a, 64);
      _tile_loadd(6, b, 64);
      _tile_loadd(7, b + group_size, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (M == 2) {
        _tile_loadd(5, a + TILE, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, acc, 64);
  _tile_stored(1, acc + 256, 64);
  if (M == 2) {
    _tile_stored(2, acc + 512, 64);
    _tile_stored(3, acc + 768, 64);
  }
}

// Convolve one block and hand the 16 M outputs of each pixel, as acc[m][group][16 channels][16 images], to `epilogue`.
template <int M, class Epilogue>
void gather_block(const bf16* source, const Pairs& pairs, int targets, const bf16* weights, int taps, int inputs,
                  int outputs, Epilogue epilogue) {
  alignas(64) float acc[4 * 256];
  const size_t panel = size_t(taps) * (inputs / std::min(inputs, 32)) * M * TILE;
  for (int k = 0; k < outputs; k += 16 * M)
    for (int pixel = 0; pixel < targets; ++pixel) {
      gather_pixel<M>(source, pairs, pixel, weights + (k / (16 * M)) * panel, inputs, acc);
      epilogue(k, pixel, acc);
    }
}

template <int M>
void forward_block(const bf16* source, const Pairs& pairs, int targets, const bf16* weights, int taps, int inputs,
                   int outputs, bf16* out, float* sums, float* squares) {
  alignas(64) float s[32][16], q[32][16];
  auto epilogue = [&](int k, int pixel, const float* acc) {
    if (!sums) {
      for (int m = 0; m < M; ++m)
        for (int j = 0; j < 16; j += 2)
          for (int group = 0; group < 2; ++group) {
            const float* rows = acc + (2 * m + group) * 256 + j * 16;
            store(out + (size_t(pixel) * 2 + group) * outputs * GROUP + size_t(k + 16 * m + j) * GROUP,
                  pack(_mm512_load_ps(rows), _mm512_load_ps(rows + 16)));
          }
      return;
    }
    if (pixel == 0) std::memset(s, 0, sizeof s), std::memset(q, 0, sizeof q);
    for (int m = 0; m < M; ++m)
      for (int j = 0; j < 16; j += 2) {
        const int r = 16 * m + j;
        __m512 s0 = _mm512_load_ps(s[r]), s1 = _mm512_load_ps(s[r + 1]);
        __m512 q0 = _mm512_load_ps(q[r]), q1 = _mm512_load_ps(q[r + 1]);
        for (int group = 0; group < 2; ++group) {
          const float* rows = acc + (2 * m + group) * 256 + j * 16;
          const __m512 v0 = _mm512_load_ps(rows), v1 = _mm512_load_ps(rows + 16);
          s0 = _mm512_add_ps(s0, v0), s1 = _mm512_add_ps(s1, v1);
          q0 = _mm512_fmadd_ps(v0, v0, q0), q1 = _mm512_fmadd_ps(v1, v1, q1);
          store(out + (size_t(pixel) * 2 + group) * outputs * GROUP + size_t(k + r) * GROUP, pack(v0, v1));
        }
        _mm512_store_ps(s[r], s0), _mm512_store_ps(s[r + 1], s1);
        _mm512_store_ps(q[r], q0), _mm512_store_ps(q[r + 1], q1);
      }
    if (pixel == targets - 1)
      for (int r = 0; r < 16 * M; ++r) {
        sums[k + r] = _mm512_reduce_add_ps(_mm512_load_ps(s[r]));
        squares[k + r] = _mm512_reduce_add_ps(_mm512_load_ps(q[r]));
      }
  };
  gather_block<M>(source, pairs, targets, weights, taps, inputs, outputs, epilogue);
}

// The gradient at a convolution's input. With an activation on load, it goes on through ReLU and scale to y, and to the
// scale and shift themselves (null d_scale: not wanted); without one (null scale) it is stored as it is. `extra` (null:
// none) is added: the gradient that x receives from elsewhere.
template <int M>
void backward_block(const bf16* gradient, const Pairs& pairs, int targets, const bf16* weights, int taps, int outputs,
                    int inputs, const bf16* y, Affine affine, const bf16* extra, bf16* out, float* d_scale,
                    float* d_shift) {
  alignas(64) float ds[32][16], db[32][16];
  const __m512 zero = _mm512_setzero_ps();
  auto epilogue = [&](int c, int pixel, const float* acc) {
    if (pixel == 0) std::memset(ds, 0, sizeof ds), std::memset(db, 0, sizeof db);
    for (int m = 0; m < M; ++m)
      for (int j = 0; j < 16; j += 2)
        for (int group = 0; group < 2; ++group) {
          const int r = 16 * m + j;
          const float* rows = acc + (2 * m + group) * 256 + j * 16;
          __m512 g0 = _mm512_load_ps(rows), g1 = _mm512_load_ps(rows + 16);
          const size_t at = (size_t(pixel) * 2 + group) * inputs * GROUP + size_t(c + r) * GROUP;
          if (affine.scale) {
            const __m512i v = load(y + at);
            const __m512 y0 = low(v), y1 = high(v);
            const __m512 s0 = _mm512_set1_ps(affine.scale[c + r]), s1 = _mm512_set1_ps(affine.scale[c + r + 1]);
            const __m512 z0 = _mm512_fmadd_ps(y0, s0, _mm512_set1_ps(affine.shift[c + r]));
            const __m512 z1 = _mm512_fmadd_ps(y1, s1, _mm512_set1_ps(affine.shift[c + r + 1]));
            g0 = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(z0, zero, _CMP_GT_OQ), g0);
            g1 = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(z1, zero, _CMP_GT_OQ), g1);
            if (d_scale) {
              _mm512_store_ps(ds[r], _mm512_fmadd_ps(g0, y0, _mm512_load_ps(ds[r])));
              _mm512_store_ps(ds[r + 1], _mm512_fmadd_ps(g1, y1, _mm512_load_ps(ds[r + 1])));
              _mm512_store_ps(db[r], _mm512_add_ps(g0, _mm512_load_ps(db[r])));
              _mm512_store_ps(db[r + 1], _mm512_add_ps(g1, _mm512_load_ps(db[r + 1])));
            }
            g0 = _mm512_mul_ps(g0, s0), g1 = _mm512_mul_ps(g1, s1);
          }
          if (extra) {
            const __m512i e = load(extra + at);
            g0 = _mm512_add_ps(g0, low(e)), g1 = _mm512_add_ps(g1, high(e));
          }
          store(out + at, pack(g0, g1));
        }
    if (affine.scale && d_scale && pixel == targets - 1)
      for (int r = 0; r < 16 * M; ++r) {
        d_scale[c + r] = _mm512_reduce_add_ps(_mm512_load_ps(ds[r]));
        d_shift[c + r] = _mm512_reduce_add_ps(_mm512_load_ps(db[r]));
      }
  };
  gather_block<M>(gradient, pairs, targets, weights, taps, outputs, inputs, epilogue);
}

// dW_tap[c][k] += sum over pixels and images of x[source][c] G[pixel][k], into tiles [tap][c / 16][k / 16][16][16].
// `pairs` is by tap here: for each tap its (pixel in `tap`, source) pairs.
template <int M, int N>
void weight_gradient_tiles(const bf16* x, const bf16* turned, const Pairs& pairs, int tap, int c, int k, int inputs,
                           int outputs, float* tiles) {
  const size_t c_stride = size_t(outputs / 16) * 256;
  float* at = tiles + (size_t(tap) * (inputs / 16) + c / 16) * c_stride + (k / 16) * 256;
  _tile_loadd(0, at, 64);
  if (N == 2) _tile_loadd(1, at + 256, 64);
  if (M == 2) _tile_loadd(2, at + c_stride, 64);
  if (M == 2 && N == 2) _tile_loadd(3, at + c_stride + 256, 64);
  for (int32_t i = pairs.start[tap]; i < pairs.start[tap + 1]; ++i) {
    const bf16* a = x + (size_t(pairs.source[i]) * inputs + c) * BLOCK;
    const bf16* b = turned + (size_t(pairs.tap[i]) * outputs + k) * BLOCK;
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (N == 2) {
      _tile_loadd(7, b + TILE, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (M == 2) {
      _tile_loadd(5, a + TILE, 64);
      _tile_dpbf16ps(2, 5, 6);
      if (N == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, at, 64);
  if (N == 2) _tile_stored(1, at + 256, 64);
  if (M == 2) _tile_stored(2, at + c_stride, 64);
  if (M == 2 && N == 2) _tile_stored(3, at + c_stride + 256, 64);
}

void weight_gradient_block(const bf16* x, const bf16* turned, const Pairs& pairs, int taps, int inputs, int outputs,
                           float* tiles) {
  const int m = inputs % 32 ? 1 : 2, n = outputs % 32 ? 1 : 2;
  for (int tap = 0; tap < taps; ++tap)
    for (int c = 0; c < inputs; c += 16 * m)
      for (int k = 0; k < outputs; k += 16 * n) {
        if (m == 2 && n == 2)
          weight_gradient_tiles<2, 2>(x, turned, pairs, tap, c, k, inputs, outputs, tiles);
        else if (m == 2)
          weight_gradient_tiles<2, 1>(x, turned, pairs, tap, c, k, inputs, outputs, tiles);
        else if (n == 2)
          weight_gradient_tiles<1, 2>(x, turned, pairs, tap, c, k, inputs, outputs, tiles);
        else
          weight_gradient_tiles<1, 1>(x, turned, pairs, tap, c, k, inputs, outputs, tiles);
      }
}

inline bf16 rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Where input c (of 32) of a window stands in the weights of a 3x3 convolution of RGB images; -1: nowhere.
int window_weight(int c) {
  const int pair = c / 2, second = c % 2;
  const int colour = pair < 9 ? second : 2, tap = pair < 9 ? pair : 2 * (pair - 9) + second;
  return tap < 9 ? colour * 9 + tap : -1;
}

// A convolution's weights as the rows and columns of a product: element (row, column, tap), taps side by side. The
// 27 inputs of windows are the columns, or where `turned` the rows.
struct Weights {
  const float* first;
  int row_stride, column_stride;
  bool windows, turned;

  // `count` (16 or 32) columns of one row, rounded to nearest even.
  void round(int row, int column, int count, int tap, bf16* out) const {
    if (windows) {
      for (int i = 0; i < count; ++i) {
        const int at = window_weight(turned ? row : column + i);
        out[i] = at < 0 ? 0 : rounded(first[size_t(turned ? column + i : row) * 27 + at]);
      }
      return;
    }
    const __m512i steps = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                             _mm512_set1_epi32(column_stride));
    for (int i = 0; i < count; i += 16) {
      const float* from = first + size_t(row) * row_stride + size_t(column + i) * column_stride + tap;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                          (__m256i)_mm512_cvtneps_pbh(_mm512_i32gather_ps(steps, from, 4)));
    }
  }
};

// Weights as left operands: [k / (16 M)][tap][depth chunk][M][16 k][up to 32 c], rows 64 bytes apart.
void pack_weights(int taps, int inputs, int outputs, bf16* out, const Weights& weights) {
  const int depth = std::min(inputs, 32), chunks = inputs / depth, m = outputs % 32 ? 1 : 2;
#pragma omp parallel for collapse(2)
  for (int panel = 0; panel < outputs / (16 * m); ++panel)
    for (int tap = 0; tap < taps; ++tap)
      for (int chunk = 0; chunk < chunks; ++chunk)
        for (int k = 0; k < 16 * m; ++k) {
          bf16* row = out + ((((size_t(panel) * taps + tap) * chunks + chunk) * m + k / 16) * 16 + k % 16) * ROW;
          weights.round(panel * 16 * m + k, chunk * depth, depth, tap, row);
        }
}

// Where a pixel of a packed image lies: one after the other, or cell by cell (see `blto_pack_images`).
struct Cells {
  int pixels, width, cell;
  size_t at(int block, int group, int pixel) const {
    const int y = pixel / width, x = pixel % width, area = cell * cell;
    const int index = (y / cell) * (width / cell) + x / cell, inside = (y % cell) * cell + x % cell;
    return (((size_t(block) * (pixels / area) + index) * 2 + group) * area + inside) * 2 * ROW;
  }
};

inline void load_colours(const bf16* at, __m512 c[3]) {
  const __m512i red_green = load(at);
  c[0] = low(red_green), c[1] = high(red_green), c[2] = low(load(at + ROW));
}

// Float images: [n][pixel][3], or [n][3][pixel] where `planar`. 16 pixels of 16 images are three 16 x 16 transposes.
struct Images {
  int pixels;
  bool planar;
  size_t start(int block, int group) const { return size_t(block * BLOCK + group * GROUP) * pixels * 3; }
  size_t at(int n, int pixel, int third) const {
    return size_t(n) * pixels * 3 + (planar ? third * pixels + pixel : 3 * pixel + 16 * third);
  }
  int lane(int q, int colour) const { return planar ? 16 * colour + q : 3 * q + colour; }
};

// Each pixel's three colours of 16 images, to `take(pixel, colours)`.
template <class Take>
void from_images(const float* images, const Images& place, Take take) {
  for (int p = 0; p < place.pixels; p += 16) {
    __m512i v[48];
    for (int third = 0; third < 3; ++third) {
      for (int n = 0; n < GROUP; ++n)
        v[16 * third + n] = _mm512_loadu_si512(images + place.at(n, p, third));
      transpose(v + 16 * third);
    }
    for (int q = 0; q < 16; ++q) {
      __m512 c[3];
      for (int i = 0; i < 3; ++i) c[i] = _mm512_castsi512_ps(v[place.lane(q, i)]);
      take(p + q, c);
    }
  }
}

// The way back: `make(pixel, colours)` fills in the colours of 16 images.
template <class Make>
void to_images(float* images, const Images& place, Make make) {
  for (int p = 0; p < place.pixels; p += 16) {
    __m512i v[48];
    for (int q = 0; q < 16; ++q) {
      __m512 c[3];
      make(p + q, c);
      for (int i = 0; i < 3; ++i) v[place.lane(q, i)] = _mm512_castps_si512(c[i]);
    }
    for (int third = 0; third < 3; ++third) {
      transpose(v + 16 * third);
      for (int n = 0; n < GROUP; ++n)
        _mm512_storeu_si512(images + place.at(n, p, third), v[16 * third + n]);
    }
  }
}

size_t packed_size(int taps, int inputs, int outputs) {
  return size_t(taps) * outputs * (inputs / std::min(inputs, 32)) * ROW;
}

}  // namespace

// ---------------------------------------------------------------------------------------------------- entry points

extern "C" {

// The version of the entry points below; `library.py` refuses a library that was built from another one.
int blto_abi() { return 5; }

// Ask the kernel for the tile registers. 0: granted.
int blto_request_amx() { return int(syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */)); }

// Float images in [0, 1], normalised, into [block][pixel][group][2][16][2], its second row (blue, 0); with
// a `cell` of more than one pixel a side, [block][cell][group][pixel of the cell][2][16][2]. The number of pixels is
// divisible by 16, height and width by the cell's side.
int blto_pack_images(const float* images, const float* mean, const float* inverse_std, int blocks, int pixels,
                      int width, int cell, int planar, bf16* out) {
  const Cells cells{pixels, width, cell};
  const Images place{pixels, planar != 0};
#pragma omp parallel for schedule(static)
  for (int b = 0; b < blocks; ++b)
    for (int group = 0; group < 2; ++group)
      from_images(images + place.start(b, group), place, [&](int p, __m512 c[3]) {
        for (int i = 0; i < 3; ++i)
          c[i] = _mm512_mul_ps(_mm512_sub_ps(c[i], _mm512_set1_ps(mean[i])), _mm512_set1_ps(inverse_std[i]));
        bf16* target = out + cells.at(b, group, p);
        store(target, pack(c[0], c[1]));
        store(target + ROW, pack(c[2], _mm512_setzero_ps()));
      });
  return DONE;
}

// Its adjoint: a gradient in that layout into float images.
int blto_pack_images_backward(const bf16* gradient, const float* inverse_std, int blocks, int pixels, int width,
                               int cell, int planar, float* out) {
  const Cells cells{pixels, width, cell};
  const Images place{pixels, planar != 0};
#pragma omp parallel for schedule(static)
  for (int b = 0; b < blocks; ++b)
    for (int group = 0; group < 2; ++group)
      to_images(out + place.start(b, group), place, [&](int p, __m512 c[3]) {
        load_colours(gradient + cells.at(b, group, p), c);
        for (int i = 0; i < 3; ++i) c[i] = _mm512_mul_ps(c[i], _mm512_set1_ps(inverse_std[i]));
      });
  return DONE;
}

// out = t = tanh(gain r / rms(r)), with r of packed images and its root mean square over each image, as float images;
// or, where `images` is not null, image + epsilon t, clipped to [0, 1]. `inverse_rms` is [n].
int blto_squash_forward(const bf16* r, float gain, int blocks, int pixels, int width, int cell, int planar,
                         const float* images, float epsilon, float* out, float* inverse_rms) {
  const Cells cells{pixels, width, cell};
  const Images place{pixels, planar != 0};
#pragma omp parallel for schedule(static)
  for (int b = 0; b < blocks; ++b)
    for (int group = 0; group < 2; ++group) {
      __m512 c[3], sum = _mm512_set1_ps(1e-8f * 3 * pixels);
      for (int p = 0; p < pixels; ++p) {
        load_colours(r + cells.at(b, group, p), c);
        for (int i = 0; i < 3; ++i) sum = _mm512_fmadd_ps(c[i], c[i], sum);
      }
      const __m512 inverse = _mm512_sqrt_ps(_mm512_div_ps(_mm512_set1_ps(3.0f * pixels), sum));
      _mm512_storeu_ps(inverse_rms + b * BLOCK + group * GROUP, inverse);
      const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(gain), inverse);
      to_images(out + place.start(b, group), place, [&](int p, __m512 v[3]) {
        load_colours(r + cells.at(b, group, p), v);
        for (int i = 0; i < 3; ++i) v[i] = tanh(_mm512_mul_ps(v[i], scale));
      });
      const size_t start = place.start(b, group), end = place.start(b, group + 1);
      for (size_t i = start; images && i < end; i += GROUP) {
        const __m512 moved = _mm512_fmadd_ps(_mm512_set1_ps(epsilon), _mm512_loadu_ps(out + i), _mm512_loadu_ps(images + i));
        _mm512_storeu_ps(out + i, _mm512_min_ps(_mm512_set1_ps(1.0f), relu(moved)));
      }
    }
  return DONE;
}

// Its backward pass: dout, float images, into dr, like r. `clipped` is `out` where images were given, else null: then
// the gradient ends at what is not within [0, 1], the ends left out.
int blto_squash_backward(const float* dout, const float* clipped, const bf16* r, const float* inverse_rms, float gain,
                          float epsilon, int blocks, int pixels, int width, int cell, int planar, bf16* dr) {
  const Cells cells{pixels, width, cell};
  const Images place{pixels, planar != 0};
  std::atomic<bool> failed{false};
#pragma omp parallel
  {
    static thread_local Scratch memory, gradient_memory;
    const size_t group_size = size_t(pixels) * 3 * GROUP;
    float* held = memory.get<float>(group_size, failed);  // the gradient at r with the scale held, [pixel][3][16 images]
    float* within = gradient_memory.get<float>(clipped ? group_size : 0, failed);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int b = 0; b < (failed ? 0 : blocks); ++b)
      for (int group = 0; group < 2; ++group) {
        const __m512 inverse = _mm512_loadu_ps(inverse_rms + b * BLOCK + group * GROUP);
        const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(gain), inverse), one = _mm512_set1_ps(1.0f);
        __m512 along = _mm512_setzero_ps();
        const float* gradient = dout + place.start(b, group);
        if (clipped) {
          const float* out = clipped + place.start(b, group);
          for (size_t i = 0; i < group_size; i += GROUP) {
            const __m512 v = _mm512_loadu_ps(out + i);
            const __mmask16 inside = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_GT_OQ) &
                                     _mm512_cmp_ps_mask(v, one, _CMP_LT_OQ);
            _mm512_store_ps(within + i, _mm512_maskz_mul_ps(inside, _mm512_set1_ps(epsilon), _mm512_loadu_ps(gradient + i)));
          }
          gradient = within;
        }
        from_images(gradient, place, [&](int p, __m512 g[3]) {
          __m512 v[3];
          load_colours(r + cells.at(b, group, p), v);
          for (int i = 0; i < 3; ++i) {
            const __m512 t = tanh(_mm512_mul_ps(v[i], scale));
            g[i] = _mm512_mul_ps(_mm512_mul_ps(g[i], scale), _mm512_fnmadd_ps(t, t, one));
            along = _mm512_fmadd_ps(g[i], v[i], along);
            _mm512_store_ps(held + (size_t(p) * 3 + i) * GROUP, g[i]);
          }
        });
        const __m512 share = _mm512_div_ps(_mm512_mul_ps(along, _mm512_mul_ps(inverse, inverse)),
                                           _mm512_set1_ps(3.0f * pixels));
        for (int p = 0; p < pixels; ++p) {
          __m512 v[3];
          load_colours(r + cells.at(b, group, p), v);
          for (int i = 0; i < 3; ++i)
            v[i] = _mm512_fnmadd_ps(v[i], share, _mm512_load_ps(held + (size_t(p) * 3 + i) * GROUP));
          store(dr + cells.at(b, group, p), pack(v[0], v[1]));
          store(dr + cells.at(b, group, p) + ROW, pack(v[2], _mm512_setzero_ps()));
        }
      }
  }
  return failed ? NO_MEMORY : DONE;
}

// y = conv(activate(x), w) and the per-channel sums of y and y^2 of each block (null sums: not wanted).
//   x: [blocks][in_pixels][2][inputs / 2][16][2], or packed images where `windows` (9 source pixels a target) is given
//   weights: float [outputs][inputs][taps], or [outputs][27] (channel-major, then tap) for images
//   sums: [2][blocks][outputs]
int blto_conv_forward(const bf16* x, const float* scale, const float* shift, const float* weights,
                       const int32_t* start, const int32_t* tap, const int32_t* source, const int32_t* windows,
                       int blocks, int in_pixels, int out_pixels, int taps, int inputs, int outputs, bf16* y,
                       float* sums) {
  static thread_local Scratch packed_memory;
  std::atomic<bool> failed{false};
  bf16* packed = packed_memory.get<bf16>(packed_size(taps, inputs, outputs), failed);
  if (failed) return NO_MEMORY;
  pack_weights(taps, inputs, outputs, packed, {weights, inputs * taps, taps, windows != nullptr, false});
  const Pairs pairs{start, tap, source};
  const size_t in_size = size_t(in_pixels) * inputs * BLOCK, out_size = size_t(out_pixels) * outputs * BLOCK;
#pragma omp parallel
  {
    static thread_local Scratch scratch;
    const size_t made_size = windows ? size_t(out_pixels) * 2 * TILE : scale ? in_size : 0;
    bf16* made = scratch.get<bf16>(made_size, failed);
    configure_tiles(std::min(inputs, 32));
#pragma omp barrier
#pragma omp for schedule(static)
    for (int b = 0; b < (failed ? 0 : blocks); ++b) {
      const bf16* operand = x + b * in_size;
      if (windows) {
        windows_block(x + size_t(b) * in_pixels * 2 * 2 * ROW, windows, out_pixels, made);
        operand = made;
      } else if (scale) {
        activate_block(operand, {scale, shift}, in_pixels, inputs, made);
        operand = made;
      }
      float *s = sums ? sums + size_t(b) * outputs : nullptr, *q = sums ? sums + size_t(blocks + b) * outputs : nullptr;
      if (outputs % 32)
        forward_block<1>(operand, pairs, out_pixels, packed, taps, inputs, outputs, y + b * out_size, s, q);
      else
        forward_block<2>(operand, pairs, out_pixels, packed, taps, inputs, outputs, y + b * out_size, s, q);
    }
    _tile_release();
  }
  return failed ? NO_MEMORY : DONE;
}

// The backward pass of `blto_conv_forward` for dy, and for d1 and d2, the gradients of the two sums (null: none).
//   start/tap/source: per input pixel its (tap, output pixel) pairs; tap_start/tap_pixel/tap_source: per tap its
//   (output pixel, input pixel) pairs
//   extra: like x, added to dx; null: none
//   dx: like x, the gradient at x itself (through the activation); null: not wanted
//   d_affine: [2][blocks][inputs], the gradients of scale and shift; written if there is an activation; null: not wanted
//   dw: float, shaped like weights; null: not wanted
int blto_conv_backward(const bf16* dy, const float* d1, const float* d2, const bf16* y, const bf16* x,
                        const float* scale, const float* shift, const float* weights, const int32_t* start,
                        const int32_t* tap, const int32_t* source, const int32_t* tap_start, const int32_t* tap_pixel,
                        const int32_t* tap_source, const int32_t* windows, int blocks, int in_pixels, int out_pixels,
                        int taps, int inputs, int outputs, const bf16* extra, bf16* dx, float* d_affine, float* dw) {
  static thread_local Scratch packed_memory, all_tiles;
  std::atomic<bool> failed{false};
  const size_t tiles_size = size_t(taps) * inputs * outputs;
  bf16* packed = packed_memory.get<bf16>(dx ? packed_size(taps, outputs, inputs) : 0, failed);
  float* tiles = all_tiles.get<float>(tiles_size * omp_get_max_threads(), failed);
  if (failed) return NO_MEMORY;
  if (dx) {
    pack_weights(taps, outputs, inputs, packed, {weights, taps, inputs * taps, windows != nullptr, true});
  }
  const Pairs to_input{start, tap, source}, by_tap{tap_start, tap_pixel, tap_source};
  const size_t in_size = size_t(in_pixels) * inputs * BLOCK, out_size = size_t(out_pixels) * outputs * BLOCK;
  int team = 1;
#pragma omp parallel
  {
    static thread_local Scratch plain_memory, turned_memory, x_memory, sums_memory;
    const size_t windows_size = size_t(out_pixels) * 2 * TILE;
    bf16* plain = plain_memory.get<bf16>(out_size, failed);
    bf16* turned = turned_memory.get<bf16>(out_size, failed);
    bf16* rows = x_memory.get<bf16>(windows ? 2 * windows_size : in_size, failed);
    float* pixel_sums = sums_memory.get<float>(windows ? size_t(in_pixels) * 6 * GROUP : 0, failed);
    float* own = tiles + tiles_size * omp_get_thread_num();
    if (dw) std::memset(own, 0, tiles_size * sizeof(float));
#pragma omp single
    team = omp_get_num_threads();  // at its end all threads meet, and `failed` is what it will be
#pragma omp for schedule(static)
    for (int b = 0; b < (failed ? 0 : blocks); ++b) {
      const bf16* gradient = d1 ? plain : dy + b * out_size;
      if (d1 || dw)
        gradient_block(dy + b * out_size, y + b * out_size, d1, d2, out_pixels, outputs, dx && d1 ? plain : nullptr,
                       dw ? turned : nullptr);
      const size_t image_size = size_t(in_pixels) * 2 * 2 * ROW;
      if (dw) {
        if (windows) {
          windows_block(x + b * image_size, windows, out_pixels, rows + windows_size);
          images_in_rows(rows + windows_size, {nullptr, nullptr}, out_pixels, inputs, rows);
        } else {
          images_in_rows(x + b * in_size, {scale, shift}, in_pixels, inputs, rows);
        }
        configure_tiles(32);
        weight_gradient_block(rows, turned, by_tap, taps, inputs, outputs, own);
      }
      if (!dx) continue;
      configure_tiles(std::min(outputs, 32));
      if (windows) {
        backward_block<2>(gradient, to_input, out_pixels, packed, taps, outputs, inputs, nullptr,
                          {nullptr, nullptr}, nullptr, rows, nullptr, nullptr);
        windows_adjoint(rows, windows, in_pixels, out_pixels, pixel_sums, dx + b * image_size);
        continue;
      }
      float *ds = d_affine ? d_affine + size_t(b) * inputs : nullptr;
      float *db = d_affine ? d_affine + size_t(blocks + b) * inputs : nullptr;
      const Affine affine{scale, shift};
      const bf16* more = extra ? extra + b * in_size : nullptr;
      if (inputs % 32)
        backward_block<1>(gradient, to_input, in_pixels, packed, taps, outputs, inputs, x + b * in_size, affine,
                          more, dx + b * in_size, ds, db);
      else
        backward_block<2>(gradient, to_input, in_pixels, packed, taps, outputs, inputs, x + b * in_size, affine,
                          more, dx + b * in_size, ds, db);
    }
    _tile_release();
#pragma omp for schedule(static)
    for (int c = 0; c < (dw && !failed ? inputs : 0); ++c)
      for (int t = 0; t < taps; ++t)
        for (int k = 0; k < outputs; ++k) {
          const size_t at = ((size_t(t) * (inputs / 16) + c / 16) * (outputs / 16) + k / 16) * 256 + (c % 16) * 16 + k % 16;
          float sum = 0;
          for (int thread = 0; thread < team; ++thread) sum += tiles[thread * tiles_size + at];
          if (!windows) {
            dw[(size_t(k) * inputs + c) * taps + t] = sum;
          } else if (window_weight(c) >= 0) {
            dw[size_t(k) * 27 + window_weight(c)] = sum;
          }
        }
  }
  return failed ? NO_MEMORY : DONE;
}

// out = relu(scale * y + shift + r), with r = residual, or scale_r * residual + shift_r, or 0 (null residual).
int blto_merge_forward(const bf16* y, const float* scale, const float* shift, const bf16* residual,
                        const float* scale_r, const float* shift_r, int blocks, int pixels, int channels, bf16* out) {
  const int half = channels / 2;
#pragma omp parallel for schedule(static)
  for (int row = 0; row < blocks * pixels * 2; ++row)
    for (int c = 0; c < half; ++c) {
      const size_t at = (size_t(row) * half + c) * ROW;
      const __m512i v = load(y + at);
      __m512 z0 = _mm512_fmadd_ps(low(v), _mm512_set1_ps(scale[2 * c]), _mm512_set1_ps(shift[2 * c]));
      __m512 z1 = _mm512_fmadd_ps(high(v), _mm512_set1_ps(scale[2 * c + 1]), _mm512_set1_ps(shift[2 * c + 1]));
      if (residual) {
        const __m512i r = load(residual + at);
        if (scale_r) {
          z0 = _mm512_add_ps(z0, _mm512_fmadd_ps(low(r), _mm512_set1_ps(scale_r[2 * c]), _mm512_set1_ps(shift_r[2 * c])));
          z1 = _mm512_add_ps(z1, _mm512_fmadd_ps(high(r), _mm512_set1_ps(scale_r[2 * c + 1]),
                                                 _mm512_set1_ps(shift_r[2 * c + 1])));
        } else {
          z0 = _mm512_add_ps(z0, low(r)), z1 = _mm512_add_ps(z1, high(r));
        }
      }
      store(out + at, pack(relu(z0), relu(z1)));
    }
  return DONE;
}

// The backward pass of `blto_merge_forward`. dy and dr are the gradients at y and at the residual; sums are
// [3][blocks][channels]: of scale, of scale_r, and of both shifts; null: not wanted.
int blto_merge_backward(const bf16* dout, const bf16* out, const bf16* y, const float* scale, const bf16* residual,
                         const float* scale_r, int blocks, int pixels, int channels, bf16* dy, bf16* dr, float* sums) {
  const int half = channels / 2;
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  std::atomic<bool> failed{false};
#pragma omp parallel
  {
    static thread_local Scratch memory;  // running sums of [scale, scale_r, shift][channel][16 images]
    float* lanes = memory.get<float>(size_t(3) * channels * GROUP, failed);
    auto add = [&](int which, int k, __m512 v) {
      float* at = lanes + (size_t(which) * channels + k) * GROUP;
      _mm512_store_ps(at, _mm512_add_ps(_mm512_load_ps(at), v));
    };
#pragma omp barrier
#pragma omp for schedule(static)
    for (int b = 0; b < (failed ? 0 : blocks); ++b) {
      std::memset(lanes, 0, size_t(3) * channels * GROUP * sizeof(float));
      for (int row = 0; row < 2 * pixels; ++row)
        for (int c = 0; c < half; ++c) {
          const size_t at = ((size_t(b) * pixels * 2 + row) * half + c) * ROW;
          const int k = 2 * c;
          // out is never below zero, so it is positive where its magnitude is not zero
          const __mmask32 positive = _mm512_test_epi16_mask(load(out + at), magnitude);
          const __m512i g = _mm512_maskz_mov_epi16(positive, load(dout + at));
          const __m512 g0 = low(g), g1 = high(g);
          if (sums) {  // only they need the maps themselves
            const __m512i v = load(y + at);
            add(0, k, _mm512_mul_ps(g0, low(v))), add(0, k + 1, _mm512_mul_ps(g1, high(v)));
            add(2, k, g0), add(2, k + 1, g1);
          }
          store(dy + at, pack(_mm512_mul_ps(g0, _mm512_set1_ps(scale[k])), _mm512_mul_ps(g1, _mm512_set1_ps(scale[k + 1]))));
          if (!residual) continue;
          if (scale_r) {
            if (sums) {
              const __m512i u = load(residual + at);
              add(1, k, _mm512_mul_ps(g0, low(u))), add(1, k + 1, _mm512_mul_ps(g1, high(u)));
            }
            store(dr + at, pack(_mm512_mul_ps(g0, _mm512_set1_ps(scale_r[k])),
                                _mm512_mul_ps(g1, _mm512_set1_ps(scale_r[k + 1]))));
          } else {
            store(dr + at, g);
          }
        }
      for (int which = 0; which < (sums ? 3 : 0); ++which)
        for (int k = 0; k < channels; ++k)
          sums[(size_t(which) * blocks + b) * channels + k] =
              _mm512_reduce_add_ps(_mm512_load_ps(lanes + (size_t(which) * channels + k) * GROUP));
    }
  }
  return failed ? NO_MEMORY : DONE;
}

// Mean over pixels: a map -> float [images][channels].
int blto_pool_forward(const bf16* x, int blocks, int pixels, int channels, float* out) {
  const int half = channels / 2;
#pragma omp parallel for schedule(static)
  for (int b = 0; b < blocks; ++b)
    for (int group = 0; group < 2; ++group)
      for (int c = 0; c < half; ++c) {
        __m512 s0 = _mm512_setzero_ps(), s1 = s0;
        for (int p = 0; p < pixels; ++p) {
          const __m512i v = load(x + (((size_t(b) * pixels + p) * 2 + group) * half + c) * ROW);
          s0 = _mm512_add_ps(s0, low(v)), s1 = _mm512_add_ps(s1, high(v));
        }
        alignas(64) float lanes[2][16];
        const __m512 share = _mm512_set1_ps(1.0f / float(pixels));
        _mm512_store_ps(lanes[0], _mm512_mul_ps(s0, share)), _mm512_store_ps(lanes[1], _mm512_mul_ps(s1, share));
        for (int n = 0; n < GROUP; ++n)
          for (int i = 0; i < 2; ++i) out[size_t(b * BLOCK + group * GROUP + n) * channels + 2 * c + i] = lanes[i][n];
      }
  return DONE;
}

// Its backward pass: float [images][channels] -> a map.
int blto_pool_backward(const float* dout, int blocks, int pixels, int channels, bf16* dx) {
  const int half = channels / 2;
#pragma omp parallel for schedule(static)
  for (int b = 0; b < blocks; ++b)
    for (int group = 0; group < 2; ++group)
      for (int c = 0; c < half; ++c) {
        alignas(64) float lanes[2][16];
        for (int n = 0; n < GROUP; ++n)
          for (int i = 0; i < 2; ++i)
            lanes[i][n] = dout[size_t(b * BLOCK + group * GROUP + n) * channels + 2 * c + i] / float(pixels);
        const __m512i v = pack(_mm512_load_ps(lanes[0]), _mm512_load_ps(lanes[1]));
        for (int p = 0; p < pixels; ++p) store(dx + (((size_t(b) * pixels + p) * 2 + group) * half + c) * ROW, v);
      }
  return DONE;
}

}  // extern "C"
